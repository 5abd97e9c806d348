"""Folders of torch.distributed.checkpoint: what torch writes is read, and nothing that their index could run is run."""

import io
import os
import pickle

import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint import metadata as records
from torch.distributed.checkpoint.filesystem import _StorageInfo

from retro_kernels.integrations.distributed_checkpoint import read_distributed

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def nothing(name):
    return False


def in_two_parts(folder, whole, rows=(0, 2), **changes):
    """A folder that holds `whole` in two parts of two rows, from `rows` on, as two processes write it."""
    index = records.Metadata(
        {
            "w": records.TensorStorageMetadata(
                records.TensorProperties(dtype=whole.dtype),
                whole.shape,
                [records.ChunkStorageMetadata(torch.Size([row, 0]), torch.Size([2, whole.shape[1]])) for row in rows],
            )
        }
    )
    index.storage_data = {}
    held = io.BytesIO()
    for row in rows:
        start = held.tell()
        torch.save(whole[row : row + 2].clone(), held)
        place = {"relative_path": "__0_0.distcp", "offset": start, "length": held.tell() - start, **changes}
        index.storage_data[records.MetadataIndex("w", torch.Size([row, 0]))] = _StorageInfo(**place)
    folder.mkdir()
    (folder / "__0_0.distcp").write_bytes(held.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    return folder


def test_what_torch_writes_is_read(tmp_path):
    state = {"a": {"b": torch.randn(3, 4)}, "c": torch.ones(2, dtype=torch.bfloat16), "step": 3, "d": torch.tensor(5)}
    checkpoint.save(state, checkpoint_id=tmp_path / "saved", no_dist=True)
    found = read_distributed(tmp_path / "saved", lambda name: name == "c")
    assert found.keys() == {"a.b", "d"}
    assert torch.equal(found["a.b"], state["a"]["b"])
    assert found["d"] == 5


def test_parts_are_put_together(tmp_path):
    whole = torch.randn(4, 3)
    folder = in_two_parts(tmp_path / "parts", whole)
    theirs = {"w": torch.empty(4, 3)}
    checkpoint.load(theirs, checkpoint_id=folder, no_dist=True)
    assert torch.equal(theirs["w"], whole)
    assert torch.equal(read_distributed(folder, nothing)["w"], whole)


class Runs:
    """A pickle of it runs a command where it is loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "arguments"),
    [(os.system, ("touch {}",)), (eval, ("open({!r}, 'w')",)), (torch.load, ("{}",)), (getattr, ("x", "{}"))],
    ids=lambda x: getattr(x, "__name__", ""),
)
@pytest.mark.parametrize("place", ["whole", "inside"])
def test_an_index_that_would_run_something_is_refused_unrun(tmp_path, function, arguments, place):
    mark = tmp_path / "ran"
    bad = Runs(function, *[x.format(str(mark)) if isinstance(x, str) else x for x in arguments])
    if place == "inside":
        whole = records.Metadata({})
        whole.planner_data = {"x": bad}
        bad = whole
    (tmp_path / ".metadata").write_bytes(pickle.dumps(bad))
    with pytest.raises(ValueError, match=rf"holds more than an index .*{function.__name__}.*could run any code"):
        read_distributed(tmp_path, nothing)
    assert not mark.exists()


def test_parts_are_read_weights_only_too(tmp_path):
    mark = tmp_path / "ran"
    folder = in_two_parts(tmp_path / "parts", torch.ones(4, 3))
    held = io.BytesIO()
    torch.save(Runs(os.system, f"touch {mark}"), held)
    (folder / "__0_0.distcp").write_bytes(held.getvalue())
    with pytest.raises(ValueError, match="no tensor at byte 0"):
        read_distributed(folder, nothing)
    assert not mark.exists()


def test_folders_that_do_not_fit_are_refused(tmp_path):
    whole = torch.ones(4, 3)
    outside = in_two_parts(tmp_path / "outside", whole, relative_path="../parts/__0_0.distcp")
    packed = in_two_parts(tmp_path / "packed", whole, transform_descriptors=["zstd"])
    gone = in_two_parts(tmp_path / "gone", whole)
    (gone / "__0_0.distcp").unlink()
    short = in_two_parts(tmp_path / "short", whole)
    (short / ".metadata").write_bytes((short / ".metadata").read_bytes()[:100])
    twice = in_two_parts(tmp_path / "twice", whole, offset=0)
    swapped = in_two_parts(tmp_path / "swapped", torch.ones(5, 3))  # two parts of two rows, of five
    overlapping = in_two_parts(
        tmp_path / "overlapping", whole, rows=(0, 1)
    )  # four rows in all, and none of them the last
    for folder, kind, message in (
        (outside, ValueError, r"\.\./parts/__0_0\.distcp', expected a file of its folder"),
        (packed, ValueError, r"transformed by \['zstd'\]"),
        (gone, FileNotFoundError, r"__0_0\.distcp is not there"),
        (short, ValueError, "no index that can be read"),
        (swapped, ValueError, r"do not make up its shape \[5, 3\]"),
        (overlapping, ValueError, r"do not make up its shape \[4, 3\]"),
    ):
        with pytest.raises(kind, match=message):
            read_distributed(folder, nothing)
    assert torch.equal(read_distributed(twice, nothing)["w"], whole)  # the same bytes for both parts, which fit
