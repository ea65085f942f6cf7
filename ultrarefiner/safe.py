"""The one place where PyTorch files are read: nothing in them is executed, and damage is noticed."""

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from ultrarefiner.errors import UserError


def load(path: str | Path) -> Any:
    """The content of a PyTorch file, on the CPU; nothing in it is ever executed.

    The file's own CRC-32 sums are checked, which PyTorch itself does not do.

    Raises:
        UserError: no such file, damaged, or holding Python objects other than tensors and plain containers.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"the checkpoint {path} does not exist; give the path of a weights file")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                member = archive.testzip()
            if member is not None:
                raise UserError(f"{path} is damaged (checksum of {member}); copy or make it again")
        with warnings.catch_warnings():
            # A protocol that PyTorch does not write: what it cannot read for that ends in a sentence below.
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is refused: it is no checkpoint of plain tensors (it is damaged, or holds code that unpickling "
            "would run); save it again as a plain state_dict"
        ) from error
    except Exception as error:  # a damaged file can end in any exception of the unpickler, IndexError included
        raise UserError(f"{path} cannot be read, it is truncated or damaged; copy or make it again") from error
