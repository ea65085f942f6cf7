"""Finding and pairing the files of a data set, and refusing what cannot be trusted, in the user's words."""

import csv
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ultrarefiner.data.cases import Exclusion
from ultrarefiner.data.images import SUFFIXES
from ultrarefiner.errors import UserError

_HIDDEN = frozenset({"thumbs.db", "desktop.ini"})  # what file managers leave behind; names with a leading dot as well


def find_root(dataset: str, data_root: str | Path | None, folders: Iterable[str], layout: Iterable[str]) -> Path:
    """The data set's own folder: ``data_root`` itself, or the folder of the publisher's name in it.

    Args:
        dataset: name of the data set, for the messages.
        data_root: what the user gave.
        folders: names the publisher gives the folder; case, spaces, "-" and "_" do not matter.
        layout: what has to be in the folder.

    Raises:
        UserError: nothing given, no such folder, not readable, empty, or without the layout.
    """
    layout, folders = list(layout), list(folders)
    wanted = f"the folder that holds {_and(layout)}" if layout else "its folder"
    if data_root is None or not str(data_root).strip():
        raise UserError(f"dataset={dataset} needs data_root=…: {wanted}, or the folder around it.")
    root = Path(data_root).expanduser()
    if not root.exists():
        raise UserError(f"data_root={root} does not exist: give {wanted}, or the folder around it.")
    if not root.is_dir():
        raise UserError(f"data_root={root} is a file, not a folder: give {wanted}.")
    names = {entry.name for entry in entries(root)}
    if not names:
        raise UserError(f"data_root={root} is empty: give {wanted}, or the folder around it.")
    if layout and names.issuperset(layout):
        return root
    known = {_plain(folder) for folder in folders}
    inner = sorted(name for name in names if _plain(name) in known and (root / name).is_dir())
    if inner:
        root = root / inner[0]
        names = {entry.name for entry in entries(root)}
    missing = [name for name in layout if name not in names]
    if missing:
        raise UserError(
            f"{root} is not {dataset} in its original layout, {_and(missing)} missing: give data_root={wanted}, "
            "or the folder around it."
        )
    return root


def entries(folder: Path) -> list[Path]:
    """What lies in ``folder``, by name; without hidden files.

    Raises:
        UserError: it does not exist or may not be read.
    """
    try:
        found = sorted(folder.iterdir(), key=lambda path: natural(path.name))
    except FileNotFoundError as error:
        raise UserError(f"{folder} does not exist: restore the folder, or check data_root.") from error
    except NotADirectoryError as error:
        raise UserError(f"{folder} is a file where a folder should be: restore the original layout.") from error
    except PermissionError as error:
        raise UserError(f"{folder} may not be read: give yourself read permission (chmod u+rx).") from error
    return [path for path in found if not is_hidden(path.name)]


def is_hidden(name: str) -> bool:
    """Whether a file is hidden, or one that file managers leave behind."""
    return name.startswith(".") or name.lower() in _HIDDEN


def images_in(folder: Path, root: Path, left_out: list[Exclusion]) -> dict[str, Path]:
    """The image files in ``folder`` by `stem_key`; what is no image file goes to ``left_out``.

    Args:
        folder: the folder to look into, not its subfolders.
        root: the data set's folder, which no link may leave.
        left_out: receives a line for each file that is no image.

    Raises:
        UserError: a name that is not safe, a link out of ``root``, a broken link, or two names that differ only in
            upper and lower case, in their suffix, or in how an accent is encoded.
    """
    found: dict[str, Path] = {}
    for path in entries(folder):
        check_name(path)
        if path.suffix.lower() not in SUFFIXES:
            kind = "a folder" if path.is_dir() else f"no image ({path.suffix or 'no suffix'})"
            left_out.append(Exclusion(str(path.relative_to(root)), kind))
            continue
        check_link(path, root)
        key = stem_key(path.stem)
        if key in found:
            raise UserError(
                f"{path} and {found[key].name} have the same name but for case, accents or suffix, so it is not clear "
                "which one a mask belongs to: rename or remove one."
            )
        found[key] = path
    return found


def require_pairs(images: Mapping[str, Path], masks: Mapping[str, object], image_dir: Path, mask_dir: Path) -> None:
    """Check that each image has its mask and each mask its image, both given by the same keys.

    Raises:
        UserError: naming the first lone file of each kind and how many more there are.
    """
    faults = []
    for there, here, folder, lone, partner in (
        (images, masks, mask_dir, "image", "mask"),
        (masks, images, image_dir, "mask", "image"),
    ):
        alone = [key for key in there if key not in here]
        if alone:
            first = there[alone[0]]
            first = first[0] if isinstance(first, list | tuple) else first
            more = f" (and {len(alone) - 1} more like it)" if len(alone) > 1 else ""
            faults.append(
                f"{first} is a{'n' if lone == 'image' else ''} {lone} without its {partner} in {folder}{more}: "
                f"restore the {partner}, or remove the {lone}."
            )
    if faults:
        raise UserError(" ".join(faults))
    if not images:
        raise UserError(f"{image_dir} holds no image (png, jpg, tif, bmp or dcm): check data_root.")


def read_table(path: Path, columns: Iterable[str], key: str) -> dict[str, dict[str, str]]:
    """The rows of a CSV file by their ``key`` column, values stripped.

    UTF-8 with or without byte-order mark; separated by commas or semicolons.

    Raises:
        UserError: not readable, not text, without one of ``columns``, ragged, or with an ID twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): restore the file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: save it as CSV in UTF-8.") from error
    header = text.splitlines()[0] if text.strip() else ""
    lines = csv.DictReader(text.splitlines(), delimiter=";" if header.count(";") > header.count(",") else ",")
    try:
        there = [name.strip() for name in lines.fieldnames or ()]
    except csv.Error as error:
        raise UserError(f"{path} has no header that CSV allows ({error}): correct the file.") from error
    missing = [name for name in columns if name not in there]
    if missing:
        raise UserError(f"{path} has no column {_and(missing)} (it has {_and(there) or 'none'}): restore or name it.")
    lines.fieldnames = there
    if twice := [name for name in dict.fromkeys(there) if name and there.count(name) > 1]:
        raise UserError(f"{path} has the column {twice[0]} more than once: remove or rename one of them.")
    rows: dict[str, dict[str, str]] = {}
    for row in _read(lines, path):
        if None in row or None in row.values():
            raise UserError(f"{path}, line {lines.line_num}, has not as many values as columns: correct the line.")
        name = row[key].strip()
        if name in rows:
            raise UserError(f"{path}, line {lines.line_num}, names {key} {name!r} a second time: remove one of them.")
        rows[name] = {column: value.strip() for column, value in row.items()}
    if not rows:
        raise UserError(f"{path} has no rows: restore the file.")
    return rows


def _read(lines: "csv.DictReader[str]", path: Path) -> Iterator[dict[str, str]]:
    try:
        yield from lines
    except csv.Error as error:
        raise UserError(f"{path}, after line {lines.line_num}, is no CSV ({error}): correct the file.") from error


def check_name(path: Path) -> None:
    """Refuse a file name with a line break or another control character, or one that is no valid text."""
    name = path.name
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name):
        raise UserError(
            f"{path.parent!s}: the file {name!r} has a line break, a control character or an invalid byte in its "
            "name, which breaks tables and scripts: rename it."
        )


def check_link(path: Path, root: Path) -> None:
    """Refuse a link that is broken, circular, or leaves ``root``: what it points to is not part of the data set."""
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} is a broken link: restore what it points to, or remove it.") from error
    if not target.is_relative_to(root.resolve()):
        raise UserError(f"{path} is a link that leaves {root} (to {target}): copy the file into the data set's folder.")
    if not target.is_file():
        raise UserError(f"{path} has the name of an image but is no file: remove it.")


def stem_key(stem: str) -> str:
    """What two names must share to be the same: composed accents and no case, as file systems that ignore both do."""
    return unicodedata.normalize("NFC", stem).casefold()


def natural(name: str) -> list[tuple[int, int, str]]:
    """A sorting key that puts "2" before "10"."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).casefold()


def _and(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)
