"""A page to look at single images: `python -m ultrarefiner.demo`.

Whatever needs torch is imported where it is used, so that `--help`, `--cfg job` and completion are quick.
"""

import os
import socket
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from ultrarefiner import cli
from ultrarefiner.errors import UserError
from ultrarefiner.extras import imported
from ultrarefiner.results.safety import Safety
from ultrarefiner.settings import setting

INTRODUCTION = """\
Look at single images in the browser: drop one, see what was found and how sure that is, move the box, refine again.

  python -m ultrarefiner.demo                          with the pair that ships
  python -m ultrarefiner.demo checkpoint=outputs/busbra/lite/e2e-…

It needs Gradio: pip install 'ultrarefiner[demo]'. Images stay on this computer, nothing is fetched from elsewhere."""

VALUES = """\
Values
  checkpoint=PATH        a run's directory, one of its checkpoints, or a folder of ultrarefiner.export
  port=7860              where the page is: http://127.0.0.1:7860
  open=true              open it in the browser
  host=127.0.0.1         0.0.0.0 lets other computers see it, without a password
  device=auto            cpu, cuda or mps
  safety.KEY=VALUE       as --cfg job prints them; null switches a rule off
  --cfg job              print the composed configuration"""


@dataclass
class DemoConfig:
    """A page to look at single images; conf/demo.yaml says what the keys mean."""

    checkpoint: str | None = None
    port: int = setting(7860, at_least=1, at_most=65535)
    open: bool = True
    host: str = "127.0.0.1"
    device: str = "auto"
    safety: Safety = field(default_factory=Safety)


def help_text() -> str:
    """The help page."""
    return cli.help_page(INTRODUCTION, {"safety": "which redrawn masks are rejected"}, VALUES)


def _demo(cfg: DictConfig) -> None:
    try:
        socket.create_server((cfg.host, cfg.port)).close()
    except OSError as error:
        reason = error.strerror or str(error)
        where = f"{cfg.host}, port={cfg.port} ({reason})"
        raise UserError(f"nothing can listen at {where}: give another port, or host.") from error
    with tempfile.TemporaryDirectory(prefix="ultrarefiner-demo-") as folder:  # images are gone when it ends
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder, "HF_HUB_OFFLINE": "1"}
        imported("gradio", "gradio", "demo")
        from ultrarefiner.explore import Explorer
        from ultrarefiner.explore_page import NAMES, STYLE, THEME, Page
        from ultrarefiner.segmenter import Segmenter, checkpoint_file, content_hash

        plain: Any = OmegaConf.to_container(cfg)
        explorer = Explorer(Segmenter.load(cfg.checkpoint, cfg.device, safety=Safety(**plain["safety"])))
        model = f"{cfg.checkpoint or 'the pair that ships'} ({content_hash(checkpoint_file(cfg.checkpoint))[:12]})"
        examples = sorted((cli.HOME / "examples" / "images").glob("*.png"))
        page = Page(explorer, model, Path(folder), examples).build()
        print(f"http://{cfg.host}:{cfg.port} shows the page; Ctrl+C ends it", flush=True)
        page.launch(
            server_name=cfg.host, server_port=cfg.port, inbrowser=cfg.open, share=False, quiet=True, ssr_mode=False,
            theme=THEME, css=STYLE, js=NAMES, footer_links=[], max_file_size="500mb",
            allowed_paths=[str(p) for p in examples],
        )  # fmt: skip


def main() -> None:
    """Console script `ultrarefiner-demo`."""
    ConfigStore.instance().store(name="schema_demo", node=DemoConfig)
    cli.quote_paths("checkpoint")
    cli.launch(_demo, "demo", help_text)


if __name__ == "__main__":
    main()
