"""What test_training runs as each of two processes: DDP, then FSDP2, over gloo, into the folder given."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from training_common import COMPARABLE, settings, stream_of

from retro_kernels.models.training import Trainer


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    stream = stream_of(folder / "data", write=False)
    for parallel in ("ddp", "fsdp"):
        for steps in (2, 4):  # the second takes up the first's checkpoint; both updates of the first are warm-up
            options = settings(folder / parallel, steps=steps, parallel=parallel, micro_batch_size=1, **COMPARABLE)
            Trainer(stream.config, stream, options, say=lambda text: None).run()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
