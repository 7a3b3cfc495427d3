"""The file of a run, which is complete at any time."""

import time
from pathlib import Path

import torch

from benchmarks.harness import Table, machine


class Report:
    """Writes ``RESULTS-GPU.md`` anew after each piece.

    :param Path folder: where to write.
    :param torch.device device: the device that is measured.
    :param str command: the command of the run.
    """

    def __init__(self, folder: Path, device: torch.device, command: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "RESULTS-GPU.md"
        self.start = time.perf_counter()
        self.parts: dict[str, list[Table | str]] = {}
        self.head = [
            "# Results on a GPU",
            f"    {command}",
            f"- Date: {time.strftime('%Y-%m-%d')}.",
            f"- Machine: {machine(device)}.",
        ]
        if device.type == "cuda":
            memory = torch.cuda.get_device_properties(device).total_memory
            self.head.append(f"- CUDA {torch.version.cuda}, {memory / 2**30:.0f} GiB, TF32 off.")

    def add(self, part: str, piece: Table | str) -> None:
        """Adds a table or a paragraph to a part; a table that is there already has grown."""
        pieces = self.parts.setdefault(part, [])
        if not any(piece is other for other in pieces):
            pieces.append(piece)
        self.path.write_text(self.markdown())

    def markdown(self) -> str:
        """The whole file."""
        seconds = time.perf_counter() - self.start
        title, command, *items = self.head
        items.append(f"- Duration: {seconds:.0f} s.")
        paragraphs = [title, command, "\n".join(items)]
        for part, pieces in self.parts.items():
            paragraphs.append(f"## {part}")
            for piece in pieces:
                text = piece if isinstance(piece, str) else piece.markdown()
                paragraphs.append(text.removeprefix(f"### {part}\n").strip("\n"))
        return "\n\n".join(paragraphs) + "\n"
