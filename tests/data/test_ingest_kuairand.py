"""KuaiRand-Pure: the published CSV layout by hand, and the real exposures where they are at hand."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from c2al.config import load_config
from c2al.data.ingest import kuairand
from c2al.data.parquet import BatchReader
from c2al.data.statistics import fit_statistics
from c2al.errors import DataError

REAL = Path(__file__).parents[3] / "shared" / "data" / "kuairand_pure"
SPLITS = ("train", "validation", "test")
AFTER_THE_FACT = {
    *("is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view", "play_time_ms"),
    *("profile_stay_time", "comment_stay_time", "is_profile_enter"),
}
LOG_HEADER = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
)
DAY_MS = 86_400_000
EPOCH = pd.Timestamp("2022-04-08", tz="Asia/Shanghai").value // 1_000_000


def exposure(user, video, date, minute, click=0, like=0, long=0, tab=1):
    day = (pd.Timestamp(str(date)) - pd.Timestamp("20220408")).days
    time = EPOCH + day * DAY_MS + minute * 60_000
    hourmin = minute // 60 * 100 + minute % 60
    return f"{user},{video},{date},{hourmin},{time},{click},{like},0,0,0,0,{long},5000,9000,0,0,0,0,{tab}"


PAST = [
    exposure(1, 10, 20220408, 5, long=1),
    exposure(1, 11, 20220409, 5, like=1),
    exposure(1, 10, 20220409, 9),
    exposure(2, 10, 20220424, 1, long=1),
]
WINDOW = [
    exposure(1, 10, 20220425, 60, click=1),
    exposure(1, 11, 20220425, 61, click=1),
    exposure(1, 10, 20220426, 0, click=0),
    exposure(2, 10, 20220426, 0, click=1),
    exposure(1, 10, 20220504, 600, click=1, tab=0),
    exposure(1, 10, 20220505, 0, click=1),
    exposure(3, 12, 20220506, 0, click=0),
    exposure(1, 10, 20220507, 0, click=1),
    exposure(1, 10, 20220508, 1439, click=0),
]


def write_csv(folder, past=PAST, window=WINDOW):
    folder.mkdir()
    (folder / "log_standard_4_08_to_4_21_pure.csv").write_text("\n".join([LOG_HEADER, *past[:3], ""]))
    (folder / "log_standard_4_22_to_5_08_pure.csv").write_text("\n".join([LOG_HEADER, *past[3:], *window, ""]))
    (folder / "log_random_4_22_to_5_08_pure.csv").write_text("must not be read")
    ranges = [f"{c}_range" for c in ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")]
    header = ["user_id", "user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author"]
    header += ["follow_user_num", "fans_user_num", "friend_user_num", "register_days", *ranges]
    header += [f"onehot_feat{i}" for i in range(18)]
    users = [
        f'{u},full_active,0,-124,1,5,4,3,800,"(0,10]","[1,10)","[1,5)",730+,'
        + ",".join(["7"] * 4 + [""] + ["2.0"] * 13)
        for u in (1, 2, 3)
    ]
    (folder / "user_features_pure.csv").write_text("\n".join([",".join(header), *users, ""]))
    header = (
        "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,server_height"
    )
    videos = [
        '10,77,NORMAL,2022-04-10,Web,0.0,9000.0,720.0,1280.0,900,9.0,"20,43"',
        "11,78,AD,2022-04-09,Kmovie,0.0,,720.0,1280.0,901,,5",
        "12,79,NORMAL,2022-04-11,Web,0.0,9000.0,720.0,1280.0,902,4.0,",
    ]
    (folder / "video_features_basic_pure.csv").write_text("\n".join([header + ",music_id,music_type,tag", *videos, ""]))
    return folder


@pytest.fixture
def rows(tmp_path):
    counts = kuairand.ingest(write_csv(tmp_path / "in"), tmp_path / "out")
    assert counts == {"train": 5, "validation": 2, "test": 2}
    return [r for s in SPLITS for r in pq.read_table(tmp_path / "out" / s).to_pylist()]


def test_rows_labels_and_features(rows):
    assert [r["row_id"] for r in rows] == list(range(9))
    assert [(r["date"], r["user_id"], r["video_id"]) for r in rows[:4]] == [
        (20220425, 1, 10),
        (20220425, 1, 11),
        (20220426, 1, 10),
        (20220426, 2, 10),
    ]
    assert [r["label"] for r in rows] == [1, 1, 0, 1, 1, 1, 0, 1, 0]
    assert [r["hour"] for r in rows] == [1, 1, 0, 0, 10, 0, 0, 0, 23]
    assert not set(rows[0]) & AFTER_THE_FACT
    first = rows[0]
    assert (first["follow_user_num_range"], first["onehot_feat4"], first["onehot_feat5"]) == ("(0,10]", None, 2)
    assert (first["tags"], rows[1]["tags"], rows[6]["tags"]) == ([20, 43], [5], None)
    assert (first["upload_age_days"], first["server_width"], rows[1]["music_type"]) == (15, 720, None)


def test_history_ends_before_the_window(rows):
    first, stranger = rows[0], rows[6]
    assert first["watch_history"] == [10, 11, 10]
    assert first["like_history"] == [11]
    assert first["long_watch_history"] == [10]
    assert first["user_activity"] == first["user_history"] == 3
    assert first["video_history"] == 3
    assert first["user_tag_history"] == 2
    assert (stranger["watch_history"], stranger["user_activity"], stranger["user_history"]) == (None, 0, 0)
    # Watched 3 times, 2 of them of a video that was watched long; overall 3 of 4. Five imaginary ones.
    assert first["user_long_rate"] == pytest.approx((2 + 5 * 3 / 4) / (3 + 5))
    assert rows[8]["user_long_rate"] == first["user_long_rate"]


def test_label_rates_see_only_labels_of_earlier_days_and_splits(rows):
    prior = 4 / 5
    seen = [0, 0, 2, 0, 3, 4, 0, 5, 5]
    assert [r["user_seen"] for r in rows] == seen
    for row, n, s in zip(rows, seen, [0, 0, 2, 0, 2, 3, 0, 4, 4], strict=True):
        assert row["user_label_rate"] == pytest.approx((s + 5 * prior) / (n + 5))
    assert [r["video_seen"] for r in rows] == [0, 0, 1, 1, 3, 4, 0, 5, 5]
    assert [r["user_tab_seen"] for r in rows] == [0, 0, 2, 0, 0, 3, 0, 4, 4]


def test_session_sees_only_earlier_times(rows):
    assert [r["user_exposures"] for r in rows] == [0, 1, 2, 0, 3, 4, 0, 5, 6]
    gaps = [None, 60, 82_740, None, None, 50_400, None, 2 * 86_400, 2 * 86_400 - 60]
    gaps[4] = 8 * 86_400 + 600 * 60
    assert [r["seconds_since_exposure"] for r in rows] == pytest.approx(gaps)


def test_popularity_counts_training_days(rows):
    assert [r["video_popularity"] for r in rows] == [4, 1, 4, 4, 4, 4, 0, 4, 4]


def ingest_flipped(tmp_path, start):
    """The same exposures with the labels of WINDOW[start:] turned over."""
    flipped = []
    for line in WINDOW[start:]:
        values = line.split(",")
        values[5] = str(1 - int(values[5]))
        flipped.append(",".join(values))
    kuairand.ingest(write_csv(tmp_path / "other", window=WINDOW[:start] + flipped), tmp_path / "flipped")
    return [r for s in SPLITS for r in pq.read_table(tmp_path / "flipped" / s).to_pylist()]


def test_labels_of_the_test_days_reach_no_feature(tmp_path, rows):
    changed = ingest_flipped(tmp_path, 7)
    assert [r.pop("label") for r in changed] == [1, 1, 0, 1, 1, 1, 0, 0, 1]
    assert changed == [{c: v for c, v in r.items() if c != "label"} for r in rows]


def test_labels_of_the_validation_days_reach_features_of_the_test_days_alone(tmp_path, rows):
    changed = ingest_flipped(tmp_path, 5)
    for before, after in zip(rows[:7], changed[:7], strict=True):
        assert {**after, "label": before["label"]} == before
    assert all(
        after["user_label_rate"] < before["user_label_rate"]
        for before, after in zip(rows[7:], changed[7:], strict=True)
    )


def test_a_training_label_reaches_only_later_days(tmp_path, rows):
    """But for the mean training label, the one number that all rows share: it is taken out again."""

    def sums(rows):
        prior = np.mean([r["label"] for r in rows[:5]])
        keys = ("user", "video", "user_tab", "video_tab")
        return [[r[f"{k}_label_rate"] * (r[f"{k}_seen"] + 5) - 5 * prior for k in keys] for r in rows]

    before, after = sums(rows), sums(ingest_flipped(tmp_path, 2))
    np.testing.assert_allclose(before[:4], after[:4], atol=1e-6)
    assert np.abs(np.subtract(before, after)[4:]).sum() > 0.5


def test_equal_times_see_the_same_past():
    count, gap = kuairand._session(np.array([1, 1, 1, 2, 1]), np.array([1000, 5000, 5000, 0, 9000]))
    assert count.tolist() == [0, 1, 1, 0, 3]
    assert np.array_equal(gap, [np.nan, 4, 4, np.nan, 4], equal_nan=True)


def test_other_label(tmp_path):
    kuairand.ingest(
        write_csv(tmp_path / "in", PAST, [exposure(1, 10, 20220425, 0, click=1, like=0, long=1), *WINDOW[5:]]),
        tmp_path / "o",
        "long_view",
    )
    assert pq.read_table(tmp_path / "o" / "train")["label"].to_pylist() == [1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            WINDOW[0].replace("20220425", "today"),
            r"4_22_to_5_08_pure\.csv, line 3: column 'date' is 'today', expected int64",
        ),
        ("1,2,3", r"4_22_to_5_08_pure\.csv, line 3: 3 fields, expected 19: '1,2,3'"),
        (exposure(9, 10, 20220425, 0), "user_id 9 is in the log but has no features"),
        (exposure(1, 99, 20220425, 0), "video_id 99 is in the log but has no features"),
        (",".join(["", *WINDOW[0].split(",")[1:]]), r"line 3: column 'user_id' is empty"),
    ],
)
def test_malformed(tmp_path, line, message):
    with pytest.raises(DataError, match=message):
        kuairand.ingest(write_csv(tmp_path / "in", window=[line, *WINDOW[1:]]), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_the_archive_as_it_unpacks_is_found(tmp_path):
    (tmp_path / "KuaiRand-Pure").mkdir()
    write_csv(tmp_path / "KuaiRand-Pure" / "data")
    assert sum(kuairand.ingest(tmp_path / "KuaiRand-Pure", tmp_path / "out").values()) == 9


def test_a_set_without_training_days_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"in: leaves the split train without a row \(rows: train 0, validation 2, "):
        kuairand.ingest(write_csv(tmp_path / "in", window=WINDOW[5:]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_files(tmp_path):
    with pytest.raises(DataError, match=r"neither interactions\.parquet nor log_standard"):
        kuairand.ingest(tmp_path, tmp_path / "out")
    folder = write_csv(tmp_path / "in")
    (folder / "user_features_pure.csv").unlink()
    with pytest.raises(DataError, match=r"user_features_pure\.csv: cannot be read"):
        kuairand.ingest(folder, tmp_path / "out")


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real exposures are not at {REAL}")
def test_real_exposures(tmp_path):
    assert kuairand.ingest(REAL, tmp_path / "out") == {"train": 171_671, "validation": 27_224, "test": 29_434}
    log = pq.read_table(REAL / "interactions.parquet").to_pandas()
    out = pq.read_table(tmp_path / "out" / "train").to_pandas()
    assert not set(out.columns) & AFTER_THE_FACT
    assert out["date"].between(20220425, 20220504).all()
    assert out["label"].sum() == log["is_click"][log["date"] <= 20220504].sum()
    # One user's past by hand, from the original log.
    row = out[(out["user_seen"] >= 5) & (out["date"] == 20220503)].iloc[0]
    earlier = log[(log["user_id"] == row["user_id"]) & (log["date"] < 20220503)]
    assert row["user_seen"] == len(earlier)
    prior = out["label"].mean()
    assert row["user_label_rate"] == pytest.approx(
        (earlier["is_click"].sum() + 5 * prior) / (len(earlier) + 5), rel=1e-5
    )
    sooner = log[(log["user_id"] == row["user_id"]) & (log["time_ms"] < row["time_ms"])]
    assert row["seconds_since_exposure"] == pytest.approx((row["time_ms"] - sooner["time_ms"].max()) / 1000)
    config = load_config(Path(__file__).parents[2] / "c2al" / "configs" / "kuairand.toml")
    inputs = {f.column for f in config.data.dense} | {f.column for f in config.data.sparse}
    assert not inputs & {*AFTER_THE_FACT, "label", "time_ms", "date", "video_popularity"}
    paths = (str(tmp_path / "out" / "validation"),)
    reader = BatchReader(
        paths,
        config.data,
        fit_statistics(paths, config.data),
        batch_size=1024,
        rank=0,
        world_size=1,
        seed=0,
        shuffle=False,
        shards=1,
    )
    assert sum(int(b.weight_B.sum()) for b in reader) == 27_224
