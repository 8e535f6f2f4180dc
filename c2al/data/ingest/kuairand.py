"""KuaiRand-Pure (Gao et al., CIKM 2022): exposures of the standard policy, 2022-04-25 .. 05-08.

Split by the log's `date`: train to 05-04, validation 05-05 .. 05-06, test 05-07 .. 05-08. Of what
happened after the exposure only the chosen label is written. Features of the past obey

    history   exposures before 04-25 only, so they mean the same in every split;
    label     rates of the label: labels of days strictly before the row's own day, and before its split;
    session   times of the same user's exposures strictly before the row's own time, no labels.

`video_popularity` counts exposures over all training days and is meant as an axis, not an input.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from c2al.data.ingest.splits import SplitWriter
from c2al.data.ingest.text import read_whole
from c2al.errors import DataError
from c2al.files import new_folder

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

LABELS = ("is_click", "long_view", "is_like")
FIRST_DAY = 20220425
SPLITS = {"train": 20220504, "validation": 20220506, "test": 20220508}
"""Last day of each split."""
HISTORY_LENGTH = 50
SMOOTHING = 5.0
"""Imaginary exposures at the overall rate that every rate of the past is mixed with."""

_int, _float, _text = pa.int64(), pa.float64(), pa.string()
_LOG = dict.fromkeys(("user_id", "video_id", "date", "hourmin", "time_ms", "duration_ms", "tab"), _int)
_USER_NUMBERS = ("is_lowactive_period", "is_live_streamer", "is_video_author")
_USER_COUNTS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
_USER_RANGES = tuple(f"{c}_range" for c in _USER_COUNTS)
_ONEHOT = tuple(f"onehot_feat{i}" for i in range(18))
# Columns with missing values were written by pandas as floats: "4.0" is the integer 4.
_USERS = {
    "user_id": _int,
    "user_active_degree": _text,
    **dict.fromkeys((*_USER_NUMBERS, *_USER_COUNTS), _int),
    **dict.fromkeys(_USER_RANGES, _text),
    **dict.fromkeys(_ONEHOT, _float),
}
_VIDEOS = {
    "video_id": _int,
    "author_id": _int,
    "video_type": _text,
    "upload_dt": _text,
    "upload_type": _text,
    "server_width": _float,
    "server_height": _float,
    "music_id": _int,
    "music_type": _float,
    "tag": _text,
}
_LOGS = "log_standard_*_pure.csv"
_EVENTS = ("watch", "like", "long_watch")


def ingest(source: Path, output: Path, label: str = "is_click") -> dict[str, int]:
    """Writes <output>/{train,validation,test}; returns the rows of each split.

    `source` is the folder of the published CSVs (log_standard_*_pure.csv, user_features_pure.csv,
    video_features_basic_pure.csv), the unpacked archive, which has them in its folder `data`, or a
    folder of the same tables as Parquet (interactions, users, videos, user_history_0408_0424). Held in
    memory: the log is of a fixed size.

    Raises DataError naming the missing file, the malformed line, the id that joins nothing, or the
    split that gets no row.
    """
    source = _tables_of(source)
    log, users, videos, history = _read_parquet(source, label) if _is_parquet(source) else _read_csv(source, label)
    order = ["date", "time_ms", "user_id", "video_id", "tab", "label"]
    log = log[(log["date"] >= FIRST_DAY) & (log["date"] <= SPLITS["test"])].sort_values(order, ignore_index=True)
    if log.empty:
        raise DataError(f"{source}: no exposure between {FIRST_DAY} and {SPLITS['test']}")
    table = pa.table({**_exposure(log), **_user(log, users, source), **_video(log, videos, source)})
    for name, column in _past(log, videos, history).items():
        table = table.append_column(name, column)
    ends = np.searchsorted(log["date"], list(SPLITS.values()), side="right")
    with new_folder(output) as folder:
        writer = SplitWriter(folder)
        for split, begin, end in zip(SPLITS, [0, *ends[:-1]], ends, strict=True):
            writer.write(split, table.slice(begin, end - begin))
        return writer.close_published(source)


def _exposure(log: pd.DataFrame) -> dict[str, pa.Array]:
    training = log[log["date"] <= SPLITS["train"]]
    popularity = training["video_id"].value_counts()
    return {
        "row_id": pa.array(np.arange(len(log))),
        "label": pa.array(log["label"], pa.int8()),
        "user_id": pa.array(log["user_id"], _int),
        "video_id": pa.array(log["video_id"], _int),
        "time_ms": pa.array(log["time_ms"], _int),
        "date": pa.array(log["date"], pa.int32()),
        "hour": pa.array(log["hourmin"] // 100, pa.int8()),
        "tab": pa.array(log["tab"], pa.int8()),
        "duration_ms": pa.array(log["duration_ms"], _int),
        "video_popularity": pa.array(popularity.reindex(log["video_id"], fill_value=0).to_numpy(), _int),
    }


def _user(log: pd.DataFrame, users: pd.DataFrame, source: Path) -> dict[str, pa.Array]:
    of_row = _join(log, users, "user_id", source)
    columns = {c: pa.array(of_row[c], _text) for c in ("user_active_degree", *_USER_RANGES)}
    columns |= {c: pa.array(of_row[c], pa.int32()) for c in (*_USER_NUMBERS, *_USER_COUNTS)}
    return columns | {c: pa.array(of_row[c], pa.int32(), from_pandas=True) for c in _ONEHOT}


def _video(log: pd.DataFrame, videos: pd.DataFrame, source: Path) -> dict[str, pa.Array]:
    of_row = _join(log, videos, "video_id", source)
    shown = pd.to_datetime(log["date"].astype(str), format="%Y%m%d")
    age = (shown - pd.to_datetime(of_row["upload_dt"])).dt.days
    tags = pa.array(of_row["tag"], _text, from_pandas=True)
    columns = {c: pa.array(of_row[c], _text) for c in ("video_type", "upload_type")}
    columns |= {c: pa.array(of_row[c], _int) for c in ("author_id", "music_id")}
    numbers = ("server_width", "server_height", "music_type")
    columns |= {c: pa.array(of_row[c], pa.int32(), from_pandas=True) for c in numbers}
    return columns | {
        "upload_age_days": pa.array(age, pa.int32()),
        "tags": pa.compute.split_pattern(tags, ",").cast(pa.list_(pa.int32())),
    }


def _past(log: pd.DataFrame, videos: pd.DataFrame, history: pd.DataFrame) -> dict[str, pa.Array]:
    """Features of what came before each exposure; the module says before what."""
    user, video, tab = (log[c].to_numpy(np.int64) for c in ("user_id", "video_id", "tab"))
    label = log["label"].to_numpy(np.float64)
    first_tag = videos.set_index("video_id")["tag"].str.partition(",")[0].fillna("-1").astype(np.int64)

    events = {}
    for event in _EVENTS:
        lengths = history[f"{event}_seq"].map(len).to_numpy()
        events[event] = (
            np.repeat(history["user_id"].to_numpy(np.int64), lengths),
            np.concatenate([*history[f"{event}_seq"], []]).astype(np.int64),
        )
    watcher, watched = events["watch"]
    longs = np.isin(_pair(watcher, watched), _pair(*events["long_watch"])).astype(np.float64)
    likes = np.isin(_pair(watcher, watched), _pair(*events["like"])).astype(np.float64)
    watched_tag = np.asarray(first_tag.reindex(watched, fill_value=-1), dtype=np.int64)
    user_tag, watched_user_tag = (
        _pair(user, np.asarray(first_tag.reindex(video), dtype=np.int64)),
        _pair(watcher, watched_tag),
    )

    columns: dict[str, npt.NDArray[np.generic]] = {}
    past_keys = {"user": (user, watcher), "video": (video, watched), "user_tag": (user_tag, watched_user_tag)}
    for name, (key, past_key) in past_keys.items():
        columns[f"{name}_history"], columns[f"{name}_long_rate"] = _count_and_rate(
            past_key, longs, key, key + 1, _mean(longs)
        )
        if name != "user_tag":
            _, columns[f"{name}_like_rate"] = _count_and_rate(past_key, likes, key, key + 1, _mean(likes))

    days = np.unique(log["date"])
    day = np.searchsorted(days, log["date"])
    splits = np.array(list(SPLITS.values()))
    split = np.searchsorted(splits, log["date"])
    train = split == 0
    # Rows of validation and test know the labels of the splits before theirs, as a model trained up to there does.
    known = np.where(train, day, np.searchsorted(days, splits[split - 1], side="right"))
    prior = _mean(label[train])
    keys = {"user": user, "video": video, "user_tab": _pair(user, tab), "video_tab": _pair(video, tab)}
    for name, key in keys.items():
        # A row asks for the range of codes from its key's first day up to, but not at, the first day it does not know.
        dated = key * (len(days) + 1)
        counts = _count_and_rate(dated + day, label, dated, dated + known, prior)
        columns[f"{name}_seen"], columns[f"{name}_label_rate"] = counts

    columns["user_exposures"], gap_seconds = _session(user, log["time_ms"].to_numpy(np.int64))
    by_user = history.set_index("user_id")
    activity = by_user["impressions"].reindex(user, fill_value=0).to_numpy()
    lists = {
        f"{event}_history": pa.array(by_user[f"{event}_seq"].reindex(user), pa.list_(pa.int32()), from_pandas=True)
        for event in _EVENTS
    }
    return (
        {"user_activity": pa.array(activity, pa.int32())}
        | {c: pa.array(v, pa.int32() if v.dtype.kind == "i" else pa.float32()) for c, v in columns.items()}
        | {"seconds_since_exposure": pa.array(gap_seconds, pa.float32(), from_pandas=True)}
        | lists
    )


def _pair(a: Ints, b: Ints) -> Ints:
    """One key of two: b is an id or tag from -1 up to some thousands."""
    return a * 100_000 + b + 1


def _mean(values: Floats) -> float:
    """0 of no values."""
    return float(values.mean()) if len(values) else 0.0


def _count_and_rate(code: Ints, value: Floats, low_N: Ints, high_N: Ints, prior: float) -> tuple[Ints, Floats]:
    """How many of `code` lie in [low, high) of each row, and the mean of their `value`, smoothed by `prior`."""
    order = np.argsort(code, kind="stable")
    code, sums = code[order], np.concatenate([[0.0], np.cumsum(value[order])])
    a, b = np.searchsorted(code, low_N), np.searchsorted(code, high_N)
    return b - a, (sums[b] - sums[a] + SMOOTHING * prior) / (b - a + SMOOTHING)


def _session(user_N: Ints, time_N: Ints) -> tuple[Ints, Floats]:
    """The user's exposures before each row's time, and seconds since the last of them (NaN: none).

    Rows of one user and one time see the same past: their true order is not known.
    """
    order = np.lexsort((time_N, user_N))
    user, time, at = user_N[order], time_N[order], np.arange(len(order))
    new_user = np.concatenate([[True], user[1:] != user[:-1]])
    new_time = new_user | np.concatenate([[True], time[1:] != time[:-1]])
    user_begin = np.maximum.accumulate(np.where(new_user, at, 0))
    time_begin = np.maximum.accumulate(np.where(new_time, at, 0))
    before = time_begin - user_begin
    gap = np.where(before > 0, (time - time[time_begin - 1]) / 1000, np.nan)
    count_N, gap_N = np.empty_like(before), np.empty_like(gap)
    count_N[order], gap_N[order] = before, gap
    return count_N, gap_N


def _join(log: pd.DataFrame, table: pd.DataFrame, key: str, source: Path) -> pd.DataFrame:
    unknown = ~log[key].isin(table[key])
    if unknown.any():
        raise DataError(f"{source}: {key} {log[key][unknown].iloc[0]} is in the log but has no features")
    return table.set_index(key).loc[log[key]].reset_index(drop=True)


Tables = tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, pd.DataFrame]
"""log with `label`, users, videos, history (user_id, impressions, <event>_seq)."""


def _tables_of(source: Path) -> Path:
    """The folder of the tables: `source`, or the folder `data` that the published archive has in it."""
    inner = source / "data"
    return inner if not _is_parquet(source) and not any(source.glob(_LOGS)) and inner.is_dir() else source


def _is_parquet(source: Path) -> bool:
    return (source / "interactions.parquet").is_file()


def _read_parquet(source: Path, label: str) -> Tables:
    history = {"user_id": _int, "impressions_0408_0424": _int}
    history |= {f"{event}_seq": pa.list_(pa.int32()) for event in _EVENTS}

    def read(name: str, types: Mapping[str, pa.DataType]) -> pd.DataFrame:
        try:
            table = pq.read_table(source / f"{name}.parquet", columns=list(types))
            frame: pd.DataFrame = table.select(list(types)).cast(pa.schema(list(types.items()))).to_pandas()
            return frame
        except (pa.ArrowException, OSError, KeyError) as e:
            raise DataError(f"{source / name}.parquet: not the table expected: {e}") from e

    log = read("interactions", {**_LOG, label: _int}).rename(columns={label: "label"})
    past = read("user_history_0408_0424", history).rename(columns={"impressions_0408_0424": "impressions"})
    return log, read("users", _USERS), read("videos", _VIDEOS), past


def _read_csv(source: Path, label: str) -> Tables:
    logs = sorted(source.glob(_LOGS))
    if not logs:
        raise DataError(f"{source}: neither interactions.parquet nor log_standard_*_pure.csv is there")
    types = {**_LOG, label: _int, "long_view": _int, "is_like": _int}
    log = pa.concat_tables([read_whole(path, types, types) for path in logs]).to_pandas()
    users = read_whole(source / "user_features_pure.csv", _USERS, ["user_id"]).to_pandas()
    videos = read_whole(source / "video_features_basic_pure.csv", _VIDEOS, ["video_id", "upload_dt"]).to_pandas()
    past = log[log["date"] < FIRST_DAY].sort_values(["user_id", "date", "time_ms"], kind="stable")
    history = pd.DataFrame({"impressions": past.groupby("user_id").size()})
    events = {"watch": past, "like": past[past["is_like"] == 1], "long_watch": past[past["long_view"] == 1]}
    for event, rows in events.items():
        last = rows.groupby("user_id").tail(HISTORY_LENGTH).groupby("user_id")["video_id"].agg(list)
        history[f"{event}_seq"] = [last.get(u, []) for u in history.index]
    return log.assign(label=log[label]), users, videos, history.reset_index(names="user_id")
