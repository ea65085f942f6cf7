"""Writes pipelines as graphs, in a process without the checks of types that the tests install: no graph can hold them.

python traced.py RUN FOLDER OPTIONS …   a run as FOLDER/pair, by the command ultrarefiner.export;
                                        each of OPTIONS, such as "roi=on gate=learned", as FOLDER/0.onnx, 1.onnx, …,
                                        with FOLDER/0.pt, …: the inputs and what the networks make of them;
                                        FOLDER/refused: what is said of a network that cannot be a graph
"""

import sys
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from ultrarefiner import cli, config, export
from ultrarefiner.errors import UserError
from ultrarefiner.models import graph
from ultrarefiner.runs.build import build_cascade


class Odd(torch.nn.Module):
    """Decides by the values of its input, which no graph can."""

    def forward(self, image):
        return image.repeat(1, 2, 1, 1) * (1 if image.sum().item() > 3 else 2)


def main(run: Path, folder: Path, *every: str) -> None:
    sys.argv[1:] = [f"checkpoint={run}", f"output={folder}/pair", "format=[int8,export]"]
    export.main()
    GlobalHydra.instance().clear()
    config.register()
    with initialize_config_dir(str(cli.HOME / "conf"), version_base="1.3"):
        composed = [compose("train", options.split()) for options in every]
    for number, cfg in enumerate(composed):
        cascade = build_cascade(cfg, ("coarse", "sam"), {}).eval()
        sizes = cfg.model.coarse_size, cfg.model.image_size
        graph.write_onnx(graph.trace(cascade, *sizes), folder / f"{number}.onnx")
        inputs = [torch.rand(3, 1, size, size) for size in sizes] + [torch.tensor([0.7, 1.0, 1.3])]
        with torch.no_grad():
            wanted = cascade(*inputs).refined
        torch.save({"inputs": inputs, "refined": wanted.logits.sigmoid(), "box": wanted.boxes}, folder / f"{number}.pt")
    cascade.coarse = Odd()
    try:
        graph.trace(cascade, *sizes)
    except UserError as error:
        (folder / "refused").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
