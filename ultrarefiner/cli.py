"""What every entry point shares: Hydra with our search path, help in our own words, errors in one sentence.

Imports neither torch nor anything that does.
"""

import argparse
import contextlib
import difflib
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

import hydra
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra._internal.utils import get_args_parser
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from ultrarefiner import config, settings
from ultrarefiner.errors import Paused, UserError

PACKAGE = Path(__file__).resolve().parent
# In the wheel conf/ and experiments/ lie inside the package, in a checkout beside it.
HOME = PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parent
CONF = HOME / "conf"


class ExperimentsSource(FileConfigSource):
    """A folder of which Hydra sees experiments/ alone: any other in it would be a group, and hide a key of its name."""

    @staticmethod
    def scheme() -> str:
        """What its addresses begin with."""
        return "experiments"

    def is_group(self, config_path: str) -> bool:
        """Whether it is experiments/, or the folder itself."""
        return config_path in ("", self.scheme()) and super().is_group(config_path)

    def is_config(self, config_path: str) -> bool:
        """Whether it is a file in experiments/."""
        return config_path.startswith(f"{self.scheme()}/") and super().is_config(config_path)


class ExperimentsPath(SearchPathPlugin):
    """Makes experiments/ a config group: `+experiments=name`."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add the folder that holds experiments/ behind conf/."""
        SourcesRegistry.instance().register(ExperimentsSource)
        search_path.append("ultrarefiner", f"{ExperimentsSource.scheme()}://{HOME}")


def launch(task: Callable[[DictConfig], object], config_name: str, help_text: Callable[[], str]) -> None:
    """Compose the configuration from the command line and run `task` on it, once or as a sweep.

    A mistake of the user ends with one sentence on stderr and status 1, an interrupt with status 130; anything else is
    a bug and keeps its stack trace. SIGTERM is an interrupt too (status 143), and so is the end of what reads our
    output, such as head (status 141).
    """
    try:
        _launch(task, config_name, help_text)
        sys.stdout.flush()
    except BrokenPipeError:
        _unread()


def _unread() -> NoReturn:
    """End because nobody reads our output any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would complain again at its end
    sys.exit(128 + 13)


def _launch(task: Callable[[DictConfig], object], config_name: str, help_text: Callable[[], str]) -> None:
    for stream in (sys.stdout, sys.stderr):  # a Windows console may not know → and ┃: no reason to end a training
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text())
        return
    overrides = _parsed().overrides  # Hydra itself takes no flag between two of them
    sys.argv[1:] = [*(flag for flag in sys.argv[1:] if flag not in overrides), *map(_quoted, overrides)]
    if str(Path.cwd()) not in sys.path:  # of `python -m` the folder is there; ultrarefiner-train finds own classes too
        sys.path.append(str(Path.cwd()))
    config.register()
    Plugins.instance().register(ExperimentsPath)
    # Hydra then raises instead of printing its own report, so that all errors pass through `explain`.
    os.environ["HYDRA_FULL_ERROR"] = "1"

    def guarded(cfg: DictConfig) -> object:
        try:
            settings.check(cfg)
            return _at_home(task, cfg)
        except BrokenPipeError:
            _unread()  # here: Hydra would say that the job has failed
        except (UserError, HydraException, OmegaConfBaseException) as error:
            # A job of a sweep fails for itself and leaves the others alone; a single run is over.
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise
            if isinstance(error, Paused):
                print(error)
                sys.exit(error.STATUS)
            sys.exit(f"error: {explain(error)}")

    ended: list[int] = []

    def end(signum: int, frame: object) -> None:
        ended.append(signum)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(guarded)()
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        sys.exit(128 + (ended or [signal.SIGINT])[0])
    except (UserError, HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {explain(error)}")
    except ValueError as error:
        if re.match("Only one of --|Expecting one subcommand", str(error)):
            sys.exit(f"error: {error}; --help shows what there is")
        if "Config group override must be" not in str(error):
            raise
        given = [a for a in sys.argv[1:] if re.fullmatch(r"[\w/@]*=(null|none|true|false|[\d.]+)", a, re.IGNORECASE)]
        sys.exit(f"error: {' '.join(given)}: a group takes the name of one of its options; --help lists them")


def _parsed() -> argparse.Namespace:
    """The command line as Hydra's parser reads it."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return get_args_parser().parse_intermixed_args()
    except SystemExit as end:
        if not end.code:
            raise
        sys.exit(f"error: {said.getvalue().strip().rpartition('error: ')[2]}; --help shows what there is")


def _at_home(task: Callable[[DictConfig], object], cfg: DictConfig) -> object:
    """The task, with a sentence for the path ~somebody where there is no such user."""
    try:
        return task(cfg)
    except RuntimeError as error:
        if "home directory" not in str(error):  # Python's words
            raise
        given = " ".join(a.replace("'", "") for a in sys.argv[1:] if re.search(r"='?~\w", a))
        raise UserError(f"{given}: this machine has no such user; give the whole path") from error


def _quoted(override: str) -> str:
    """`key=value` as it is, or with the value in quotes where Hydra's grammar does not take it: paths with ~ or (1)."""
    key, equals, value = override.partition("=")
    if not equals or not re.fullmatch(r"[+~]*[\w./@-]+", key) or key.startswith("-"):
        return override
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        text = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value)
        return f"{key}='{text}'"
    return override


def quote_paths(*keys: str) -> None:
    """Let the paths on the command line, those of some keys, hold what Hydra's grammar gives a meaning: ( , = space."""
    if {"-m", "--multirun"} & set(sys.argv):  # there a comma is a sweep
        return
    for place, argument in enumerate(sys.argv[1:], 1):
        key, sign, value = argument.partition("=")
        if key in keys and sign and value not in ("", "null") and value[0] not in "'\"":
            # Hydra reads a backslash as one, except before a quote.
            escaped = re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), value)
            sys.argv[place] = f"{key}='{escaped}'"


def explain(error: BaseException) -> str:
    """The error of a user, of Hydra or of OmegaConf as one sentence that names the key and says what to do."""
    if isinstance(error, UserError):
        return str(error)
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    text = str(error)
    if options := re.search(r"Could not find '([^']+)'\s+Available options in '([^']+)':\s*((?:\t.+\n?)+)", text):
        names = [name for name in options[3].split() if not name.startswith("schema")]
        return f"{options[2]}={options[1].rpartition('/')[2]} is not there; choose one of {', '.join(names)}"
    if group := re.match(r"You must specify '([^']+)'.*Available options:\s*((?:\t.+\n?)+)", text, re.DOTALL):
        names = [name for name in group[2].split() if not name.startswith("schema")]
        return f"{group[1]}=NAME is needed, one of {', '.join(names)}"
    if missing := re.search(r"Could not find '([^']+)'", text):
        return f"{missing[1]} is not there; --help lists what is"
    if isinstance(cause, OmegaConfBaseException):
        key = str(cause.full_key or cause.key or "")
        reason = str(cause.msg or cause).splitlines()[0]
        if re.match(r"Key '.*' (not in|is not in struct)", reason):
            siblings = [str(name) for name in cause.parent_node] if cause.parent_node is not None else []
            more = f"; an argument of its class is added with +{key}=VALUE" if "_target_" in siblings else ""
            return f"there is no key {key}{_suggest(key, siblings)}; `--cfg job` prints all of them{more}"
        if unknown := re.match(r"Interpolation key '(.+)' not found", reason):
            return f"{key} is that of {unknown[1]}, which is not known here: give {key}=VALUE"
        # Hydra names the override, OmegaConf the key.
        where = re.match(r"Error merging override (.+)", text)
        place = where[1] if where else key
        if "is not a ListConfig" in reason:
            return f"{place}: this is a list, give {place.replace('=', '=[', 1)}]"
        if "is not a subclass of" in reason:
            return f"{place}: this holds settings of its own, which `--cfg job` prints; give one of them"
        return f"{place}: {reason}"
    return " ".join(re.sub("See https://hydra.cc.*", "", text.split("\n\n")[0]).split())


def _suggest(key: str, siblings: list[str]) -> str:
    parent, _, name = key.rpartition(".")
    close = difflib.get_close_matches(name, siblings, n=1)
    return f" (did you mean {parent + '.' if parent else ''}{close[0]}?)" if close else ""


def help_page(introduction: str, groups: Mapping[str, str], values: str) -> str:
    """An introduction, the options of some groups (name -> note) with what their files say of them, and a tail."""
    lines = [introduction, ""]
    for group, note in groups.items():
        folder = HOME / group[1:] if group.startswith("+") else CONF / group
        lines += [f"{group}: {note}", *(f"  {name:<12} {comment}" for name, comment in describe_options(folder)), ""]
    return "\n".join([*lines, values])


def describe_options(folder: Path) -> list[tuple[str, str]]:
    """(option, its first comment line) for each YAML file of a config group."""
    found = []
    for path in sorted(folder.glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        comments = [line.lstrip("# ") for line in lines if line.startswith("# ") and not line.startswith("# @package")]
        found.append((path.stem, comments[0] if comments else ""))
    return found
