"""Files that tools write, and what they must not write over."""
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import InputError, is_there, read_json, write_json  # noqa: E402
from model import folder_name  # noqa: E402


def check_names(names):
    """InputError where two files have one name: what is made of them is called by it."""
    (name, times), = Counter(names).most_common(1)
    if times > 1:
        raise InputError(f"two files are called {name!r}; rename one, or take one at a time")


def keep_inputs(out, paths, option="--out"):
    """InputError where a file that is to be written is one of those that are read, under any name, or is
    there and no plain file (a pipe, a folder)."""
    for path in paths:
        if is_there(out) and is_there(path) and Path(out).samefile(path):
            raise InputError(f"{path}: is read, and would be overwritten; choose another {option}")
    if is_there(out) and not Path(out).is_file():           # of a pipe, who reads it never comes to the end
        raise InputError(f"{out}: is no file; choose another {option}")


def keep_others(path, settings):
    """InputError where a file that is to be written is there, and its settings, which say that it was made here,
    are not."""
    if is_there(path) and not is_there(settings):
        raise InputError(f"{path}: is there, and was not made here; choose another --out")


def write_new(path, value, option="--out"):
    """Write JSON where nothing is; InputError where a file is there that holds anything else."""
    if is_there(path):
        try:
            same = read_json(path) == value
        except InputError:                                  # another format
            same = False
        if not same:
            raise InputError(f"{path}: is there, and holds something else; choose another {option}")
    write_json(path, value)


def folder_path(text):
    """An argparse type: the path of a folder, whose name is not empty. (Path("") is the current one.)"""
    return Path(folder_name(text))
