"""One self-contained HTML page from an experiment's folder."""

from pathlib import Path

from c2al.config import dump_config
from c2al.files import write_atomically
from c2al.report import arms, cohorts, dynamics, verdict
from c2al.report.experiment import Experiment, read_experiment
from c2al.report.page import escaped, lines, page


def write_report(experiment_dir: Path) -> Path:
    """Writes report.html into the folder of a finished experiment and returns its path.

    Reads only the files named in `c2al.report.experiment`; the same files give the same bytes. Raises a
    C2ALError naming a file that is missing or not readable.
    """
    e = read_experiment(experiment_dir)
    sections = (
        verdict.section,
        arms.section,
        arms.curve,
        cohorts.segments,
        cohorts.choice,
        cohorts.densities,
        cohorts.calibration,
        dynamics.section,
        arms.power,
        _reproduction,
    )
    target = experiment_dir / "report.html"
    write_atomically(target, page("C2AL experiment", "\n".join(section(e) for section in sections)))
    return target


def _reproduction(e: Experiment) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in e.versions.items())
    seeds = ", ".join(map(str, e.record.seeds))
    return f"""<h2>Reproduction</h2>
<pre>{lines(e.command)}</pre>
<p class="soft">{escaped(versions)}. Seeds {escaped(seeds)}; seed of the bootstrap {e.evaluation.seed}.</p>
<h3>Configuration</h3>
<pre class="tall">{lines(dump_config(e.config))}</pre>"""
