"""Kinds of files: which reader reads them, and what to do with those that none reads."""

from __future__ import annotations

__all__ = ["READ", "is_path", "read_table"]

from pathlib import Path
from typing import NoReturn

from .arrays import LIMIT, Pieces, read_matlab, read_npy, read_npz
from .columns import Wanted, select
from .delimited import PACKED, read_csv
from .tables import Table, read_parquet

READ = ".npy, .npz, .mat, .parquet, and text such as .csv, .tsv, .txt, .data (also packed as .gz, .bz2, .xz)"
_TEXT = frozenset({".csv", ".tsv", ".txt", ".data", ".dat", ".test", ".tab", ".asc", ".prn"})
_BEGIN = {b"\x93NUMPY": ".npy", b"PK\x03\x04": ".zip", b"PAR1": ".parquet", b"MATLAB": ".mat", b"\x89HDF": ".h5"}
_FRAME, _ARRAY = (
    "give {} to from_array, or save it by its .to_parquet",
    "give {} to from_array, or save it by numpy.save",
)
_FRAMES = {  # what a kind of file is, and what reads it
    ".json": ("a JSON file", "pandas.read_json({!r})"),
    ".jsonl": ("a JSON file", "pandas.read_json({!r}, lines=True)"),
    ".feather": ("a Feather file", "pandas.read_feather({!r})"),
    ".arrow": ("an Arrow file", "pandas.read_feather({!r})"),
    ".orc": ("an ORC file", "pandas.read_orc({!r})"),
    ".dta": ("a Stata file", "pandas.read_stata({!r})"),
    ".sav": ("an SPSS file", "pandas.read_spss({!r})"),
    ".sas7bdat": ("a SAS file", "pandas.read_sas({!r})"),
    ".xml": ("an XML file", "pandas.read_xml({!r})"),
    ".html": ("an HTML page", "pandas.read_html({!r})[0]"),
    ".arff": ("an ARFF file", "pandas.DataFrame(scipy.io.arff.loadarff({!r})[0])"),
    **dict.fromkeys((".xlsx", ".xls", ".xlsm", ".ods"), ("a spreadsheet", "pandas.read_excel({!r})")),
}
_ARRAYS = {
    **dict.fromkeys((".h5", ".hdf5", ".hdf"), ("an HDF5 file", "h5py.File({!r})['name'][:]")),
    **dict.fromkeys((".svm", ".libsvm"), ("a LIBSVM file", "sklearn.datasets.load_svmlight_file({!r})[0]")),
    ".nc": ("a NetCDF file", "xarray.open_dataset({!r})['name'].to_numpy()"),
    ".h5ad": ("an AnnData file", "anndata.read_h5ad({!r})"),
}
_OTHERS: dict[str, tuple[str, str]] = {  # and what to do
    **{kind: (what, _FRAME.format(code)) for kind, (what, code) in _FRAMES.items()},
    **{kind: (what, _ARRAY.format(code)) for kind, (what, code) in _ARRAYS.items()},
    **dict.fromkeys(
        (".pt", ".pth", ".pkl", ".pickle", ".joblib"),
        (
            "a pickled file",
            "unpickling runs what it says: where you trust it, load it, and save the array by numpy.save",
        ),
    ),
    **dict.fromkeys(
        (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".webp"),
        (
            "one image",
            "stack all of them into an array [N, height, width], or with channels, and save it by numpy.save",
        ),
    ),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar", ".z"), ("an archive", "unpack it, and give a file of it")),
}


def is_path(name: str) -> bool:
    """Whether a name that is no data set's is that of a file or folder: it is there, or is written like one.

    Example:
        >>> is_path("own.csv"), is_path("digist")
        (True, False)
    """
    return Path(name).expanduser().exists() or bool(Path(name).suffix) or Path(name).name != name


def read_table(
    path: Path,
    label: str | int | None = None,
    header: bool | None = None,
    limit: int = LIMIT,
    drop: Wanted = None,
    only: Wanted = None,
    member: str | None = None,
) -> Table:
    """Read a file of numbers by the reader of its kind, which its ending tells, or else its first bytes.

    Args:
        path: the file.
        label: the labels: a column by name or position, or in an ``.npz`` or ``.mat`` file an array by name.
        header: whether the first line of a text holds names; None: detected.
        limit: bytes that the data may take in memory.
        drop: columns to leave out, by name or position.
        only: the columns of the data, where they are not all others.
        member: the array of the data in an ``.npz`` or ``.mat`` file.

    Returns:
        Its data and labels.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: for a folder, another kind of file (the message says how to convert it), an argument that does not
            belong to the kind, or what its reader finds.
    """
    path = path.expanduser()
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder, and one file is read: join what it holds into one array (of images [N, height, "
            "width], by numpy.stack), and save it by numpy.save"
        )
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    kind = _kind(path)
    if header is not None and kind != ".csv":
        raise ValueError(f"header belongs to text files such as .csv, but got {path}")
    if member is not None and kind not in (".npz", ".mat"):
        raise ValueError(f"member names an array of an .npz or .mat file, but got {path}")
    if kind == ".csv":
        return read_csv(path, label, header, limit, drop, only)
    if kind == ".parquet":
        return read_parquet(path, label, limit, drop, only)
    if kind == ".npy":
        return _of_array(path, read_npy(path, limit), label, drop, only)
    x, labels = (read_npz if kind == ".npz" else read_matlab)(path, label, limit, member)
    if labels is None:
        return _of_array(path, x, label, drop, only)
    table = _of_array(path, x, None, drop, only)
    return Table(table.x, table.columns, labels)


def _of_array(path: Path, x: Pieces, label: str | int | None, drop: Wanted, only: Wanted) -> Table:
    """The columns of an array that are data, and the one that is the label."""
    if label is None and drop is None and only is None:
        return Table(x, (), None)
    if len(x.shape) != 2:
        raise ValueError(
            f"label, drop and only are positions of columns of an array [N, X], but {path} holds one of shape {x.shape}"
        )
    names = tuple(map(str, range(x.shape[1])))
    at, kept = select(path, names, label, drop, only)
    return Table(x.select(kept), tuple(names[i] for i in kept), None if at is None else x.column(at))


def _kind(path: Path) -> str:
    """The ending that stands for the reader of a file."""
    kind = path.suffix.lower()
    if kind in PACKED:
        inner = Path(path.stem).suffix.lower()
        if inner in (*_OTHERS, ".npy", ".npz", ".mat", ".parquet", ".pq"):
            raise ValueError(f"{path} is a packed file that is no text: unpack it")
        return ".csv"
    if kind in _TEXT:
        return ".csv"
    if kind in (".npy", ".npz", ".mat", ".parquet"):
        return kind
    if kind in _OTHERS:
        _refuse(path, *_OTHERS[kind])
    with path.open("rb") as file:
        begin = file.read(2**12)
    found = next((kind for sign, kind in _BEGIN.items() if begin.startswith(sign)), None)
    if found in _OTHERS:
        _refuse(path, *_OTHERS[found])
    wide = begin[:2] in (b"\xff\xfe", b"\xfe\xff")  # UTF-16, which has zero bytes
    if found is None and not wide and any(byte < 32 and byte not in b"\t\n\r\f" for byte in begin):
        _refuse(path, "no text and of no known kind", "save what it holds by numpy.save")
    return found or ".csv"


def _refuse(path: Path, what: str, remedy: str) -> NoReturn:
    raise ValueError(f"{path} is {what}, which is not read: {remedy.format(path.name)} ({READ} are read)")
