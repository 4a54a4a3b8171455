"""File formats: the reader of each, and advice for formats without a reader."""

from __future__ import annotations

__all__ = ["READ", "is_path", "read_table"]

from pathlib import Path
from typing import NoReturn

from .arrays import LIMIT, Pieces, read_matlab, read_npy, read_npz
from .columns import Wanted, select
from .delimited import PACKED, read_csv
from .missing import Missing
from .tables import Table, read_parquet

READ = ".npy, .npz, .mat, .parquet, and text such as .csv, .tsv, .txt, .data (also compressed as .gz, .bz2, .xz)"
_TEXT = frozenset({".csv", ".tsv", ".txt", ".data", ".dat", ".test", ".tab", ".asc", ".prn"})
_BEGIN = {b"\x93NUMPY": ".npy", b"PK\x03\x04": ".zip", b"PAR1": ".parquet", b"MATLAB": ".mat", b"\x89HDF": ".h5"}
_FRAME, _ARRAY = (
    "pass {} to from_array, or save it with its .to_parquet",
    "pass {} to from_array, or save it with numpy.save",
)
_FRAMES = {  # description of a format, and code that reads it
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
_OTHERS: dict[str, tuple[str, str]] = {  # description and remedy
    **{kind: (what, _FRAME.format(code)) for kind, (what, code) in _FRAMES.items()},
    **{kind: (what, _ARRAY.format(code)) for kind, (what, code) in _ARRAYS.items()},
    **dict.fromkeys(
        (".pt", ".pth", ".pkl", ".pickle", ".joblib"),
        (
            "a pickled file",
            "unpickling can run any code: if you trust it, load it, and save the array with numpy.save",
        ),
    ),
    **dict.fromkeys(
        (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".webp"),
        (
            "one image",
            "stack all images into an array [N, height, width], or with channels, and save it with numpy.save",
        ),
    ),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar", ".z"), ("an archive", "unpack it, and pass a file of it")),
}


def is_path(name: str) -> bool:
    """Whether a name (not of a data set) is a file or folder: it exists, or looks like a path.

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
    missing: Missing | None = None,
) -> Table:
    """Read a file of numbers in the format given by its suffix, or otherwise by its first bytes.

    Args:
        path: the file.
        label: the labels: a column by name or position, or in an ``.npz`` or ``.mat`` file an array by name.
        header: whether the first line of a text has names; None: detected.
        limit: the maximal bytes of the data in memory.
        drop: columns to omit, by name or position.
        only: the columns of the data, if not all others.
        member: the array of the data in an ``.npz`` or ``.mat`` file.
        missing: its words mark missing values in text; :func:`from_array` applies its numbers and its mask.

    Returns:
        Its data and labels.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: for a folder, another format (the message has a remedy), an argument that does not apply to the
            format, or an error of the reader.
    """
    path = path.expanduser()
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder, but one file was expected: join its contents into one array (for images [N, height, "
            "width], with numpy.stack), and save it with numpy.save"
        )
    if not path.is_file():
        raise FileNotFoundError(f"the file {path} does not exist")
    kind = _kind(path)
    if header is not None and kind != ".csv":
        raise ValueError(f"header applies to text files such as .csv, but got {path}")
    if member is not None and kind not in (".npz", ".mat"):
        raise ValueError(f"member names an array of an .npz or .mat file, but got {path}")
    if kind == ".csv":
        return read_csv(path, label, header, limit, drop, only, missing)
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
    """The data columns of an array, and the label column."""
    if label is None and drop is None and only is None:
        return Table(x, (), None)
    if len(x.shape) != 2:
        raise ValueError(
            f"label, drop and only select columns of an array [N, X], but {path} has an array of shape {x.shape}"
        )
    names = tuple(map(str, range(x.shape[1])))
    at, kept = select(path, names, label, drop, only)
    return Table(x.select(kept), tuple(names[i] for i in kept), None if at is None else x.column(at))


def _kind(path: Path) -> str:
    """The suffix of the format of a file."""
    kind = path.suffix.lower()
    if kind in PACKED:
        inner = Path(path.stem).suffix.lower()
        if inner in (*_OTHERS, ".npy", ".npz", ".mat", ".parquet", ".pq"):
            raise ValueError(f"{path} is a compressed file that is not text: decompress it")
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
        _refuse(path, "not text and of unknown format", "save its contents with numpy.save")
    return found or ".csv"


def _refuse(path: Path, what: str, remedy: str) -> NoReturn:
    raise ValueError(f"{path} is {what}, which is not supported: {remedy.format(path.name)} (supported: {READ})")
