"""Other ways to keep clips on a disk and to read them in random order, each set as its users would.

A peer writes one store and hands out batches of 64 clips as contiguous float16 tensors. Those that
shuffle by themselves read as many clips as the others, and all of what they open.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from clips import SyntheticClips
from reading import BATCH_SIZE, Order
from synthetic_bank import LAYER
from torch import Tensor

BANK = "float16.bank"

CLIPS_PER_TAR = 64


class Peer:
    """A format and the library that reads it."""

    name: ClassVar[str]
    package: ClassVar[str]
    store: ClassVar[str]
    """Folder of its files; peers of one format share them."""
    keeps_order: ClassVar[bool] = True
    setting: ClassVar[str]
    """How it is set, for the table's readers."""

    def __init__(self, folder: Path, clips: SyntheticClips) -> None:
        self.path, self.clips = folder / self.store, clips

    def write(self) -> None:
        """Makes the store, which is not there yet."""
        raise NotImplementedError

    def open(self, order: Order) -> Iterator[Tensor]:
        raise NotImplementedError

    @classmethod
    def missing(cls) -> str | None:
        """The package that is not installed."""
        return None if find_spec(cls.package) else cls.package

    def batch(self) -> np.ndarray:
        """Memory for a batch, touched."""
        return np.ones((BATCH_SIZE, self.clips.n_patches, self.clips.dim), np.float16)


class H5pyDirect(Peer):
    name, package, store = "h5py read_direct", "h5py", "h5py"
    setting = "a chunk a clip, into a reused array"

    def write(self) -> None:
        import h5py

        self.path.mkdir()
        shape = (self.clips.n_patches, self.clips.dim)
        with h5py.File(self.path / "clips.h5", "w") as file:
            data = file.create_dataset(
                "patches", (self.clips.n_clips, *shape), "f2", chunks=(1, *shape)
            )
            for rows in self.clips.blocks(BATCH_SIZE):
                data[rows.start : rows.stop] = self.clips.rows(rows)

    def open(self, order: Order) -> Iterator[Tensor]:
        import h5py

        return self._batches(h5py.File(self.path / "clips.h5", "r"), order)

    def _batches(self, file: Any, order: Order) -> Iterator[Tensor]:
        out = self.batch()
        with file:
            for rows in order.batches:
                for slot, row in enumerate(rows.tolist()):
                    file["patches"].read_direct(out, np.s_[row], np.s_[slot])
                yield torch.from_numpy(out[: len(rows)])


class H5pyFancy(H5pyDirect):
    name = "h5py fancy index"
    setting = "dataset[sorted rows], as most code has it"

    def _batches(self, file: Any, order: Order) -> Iterator[Tensor]:
        with file:
            for rows in order.batches:
                # h5py wants ascending rows.
                places = np.argsort(rows)
                yield torch.from_numpy(file["patches"][rows[places]][np.argsort(places)])


class WebDataset(Peer):
    name, package, store, keeps_order = "WebDataset", "webdataset", "webdataset", False
    setting = "bytes in tars of 64 clips, shards shuffled, buffer of 256, batched()"

    def write(self) -> None:
        import webdataset

        self.path.mkdir()
        pattern = f"{self.path}/%05d.tar"
        with webdataset.ShardWriter(pattern, maxcount=CLIPS_PER_TAR, verbose=0) as sink:
            for rows in self.clips.blocks(CLIPS_PER_TAR):
                for row, clip in zip(rows, self.clips.rows(rows), strict=True):
                    sink.write({"__key__": f"{row:08d}", "bin": clip.tobytes()})

    def open(self, order: Order) -> Iterator[Tensor]:
        import webdataset

        tars = sorted(map(str, self.path.glob("*.tar")))
        rng = np.random.default_rng(order.seed)
        some = rng.permutation(tars)[: len(order.rows) // CLIPS_PER_TAR].tolist()
        dataset = webdataset.WebDataset(some, shardshuffle=len(some), seed=order.seed)
        # Faster than .npy and decode(), which copy once more.
        samples = dataset.shuffle(256).to_tuple("bin").map_tuple(self._clip)
        return (torch.from_numpy(clips) for (clips,) in samples.batched(BATCH_SIZE))

    def _clip(self, data: bytes) -> np.ndarray:
        return np.frombuffer(data, np.float16).reshape(self.clips.n_patches, self.clips.dim)


class LitData(Peer):
    name, package, store, keeps_order = "litdata", "litdata", "litdata", False
    setting = "chunks of 64 MB, StreamingDataLoader without workers, one torch thread"

    def write(self) -> None:
        import litdata

        os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = str(self.path.with_name("litdata-cache"))
        litdata.optimize(
            _Samples(self.clips),
            inputs=self.clips.blocks(BATCH_SIZE),
            output_dir=str(self.path),
            chunk_bytes="64MB",
            num_workers=1,
            verbose=False,
        )

    def open(self, order: Order) -> Iterator[Tensor]:
        import litdata
        from litdata.streaming.item_loader import PyTreeLoader

        chunks = PyTreeLoader()  # the default one
        dataset = litdata.StreamingDataset(
            str(self.path),
            shuffle=True,
            seed=order.seed,
            subsample=len(order.rows) / self.clips.n_clips,
            item_loader=chunks,
        )
        loader = litdata.StreamingDataLoader(dataset, batch_size=BATCH_SIZE, num_workers=0)
        return self._batches(loader, chunks)

    def _batches(self, loader: Any, chunks: Any) -> Iterator[Tensor]:
        try:
            # Its collate copies with OpenMP, which waits wherever a core is busy: 4 times slower.
            with torch_threads(1):
                yield from loader
        finally:
            # A cache of its own keeps it, and its mapped files, alive.
            chunks.close(0)


class _Samples:
    """Clips of a block; a class, because another process calls it."""

    def __init__(self, clips: SyntheticClips) -> None:
        self._clips = clips

    def __call__(self, rows: range) -> Iterator[Tensor]:
        yield from torch.from_numpy(self._clips.rows(rows))


class HuggingFace(Peer):
    name, package, store = "HF datasets", "datasets", "datasets"
    setting = 'Arrow file, with_format("torch", dtype=float16), 64 indices a call'

    def write(self) -> None:
        import datasets

        datasets.disable_progress_bars()
        shape = (self.clips.n_patches, self.clips.dim)
        datasets.Dataset.from_generator(
            self._samples,
            features=datasets.Features({"patches": datasets.Array2D(shape, "float16")}),
            cache_dir=str(self.path),
        )

    def _samples(self) -> Iterator[dict[str, np.ndarray]]:
        for rows in self.clips.blocks(BATCH_SIZE):
            for clip in self.clips.rows(rows):
                yield {"patches": clip}

    def open(self, order: Order) -> Iterator[Tensor]:
        import datasets

        files = sorted(self.path.rglob("*.arrow"))
        parts = [datasets.Dataset.from_file(str(file)) for file in files]
        dataset = self._formatted(datasets.concatenate_datasets(parts))
        batches = (dataset[rows.tolist()]["patches"] for rows in order.batches)
        return map(torch.as_tensor, batches)

    def _formatted(self, dataset: Any) -> Any:
        # Without `dtype` its tensors are float32.
        return dataset.with_format("torch", dtype=torch.float16)


class HuggingFaceNumpy(HuggingFace):
    name = "HF datasets, numpy"
    setting = 'the same with_format("numpy", dtype=float16)'

    def _formatted(self, dataset: Any) -> Any:
        return dataset.with_format("numpy", dtype=np.float16)


class ZarrPython(Peer):
    name, package, store = "zarr-python a clip", "zarr", BANK
    setting = "the bank's own array, a clip a call, into a reused array"

    def write(self) -> None:
        raise NotImplementedError("the bank is its store")

    @property
    def array(self) -> str:
        return f"{self.path}/layers/{LAYER}/patches"

    def open(self, order: Order) -> Iterator[Tensor]:
        import zarr

        return self._batches(zarr.open_array(self.array, mode="r"), order)

    def _batches(self, array: Any, order: Order) -> Iterator[Tensor]:
        from zarr.core.buffer import default_buffer_prototype

        out, as_buffer = self.batch(), default_buffer_prototype().nd_buffer
        for rows in order.batches:
            for slot, row in enumerate(rows.tolist()):
                place = as_buffer(out[slot : slot + 1])
                array.get_basic_selection((slice(row, row + 1),), out=place)
            yield torch.from_numpy(out[: len(rows)])


class ZarrPythonOindex(ZarrPython):
    name = "zarr-python oindex"
    setting = "the bank's own array, 64 rows a call"

    def _batches(self, array: Any, order: Order) -> Iterator[Tensor]:
        return (torch.from_numpy(array.oindex[rows]) for rows in order.batches)


class Zarrs(ZarrPython):
    """As annbatch reads: one call for many slices, into memory that is there already."""

    name, package = "zarrs", "zarrs"
    setting = "the bank's own array, 64 slices a call, direct_io"
    direct_io: ClassVar[bool] = True

    def open(self, order: Order) -> Iterator[Tensor]:
        import zarr

        options = {
            "codec_pipeline.path": "zarrs.ZarrsCodecPipeline",
            "codec_pipeline.direct_io": self.direct_io,
            # Without it a selection that it cannot read goes to zarr-python, silently.
            "codec_pipeline.strict": True,
        }
        with zarr.config.set(options):
            array = zarr.open_array(self.array, mode="r")
        return self._batches(array, order)

    def _batches(self, array: Any, order: Order) -> Iterator[Tensor]:
        from zarr.core.buffer import default_buffer_prototype
        from zarr.core.sync import sync

        out, prototype = self.batch(), default_buffer_prototype()
        for rows in order.batches:
            some = prototype.nd_buffer(out[: len(rows)])
            sync(
                array.async_array._get_selection(
                    _many_rows(array, rows), prototype=prototype, out=some
                )
            )
            yield torch.from_numpy(out[: len(rows)])


class ZarrsBuffered(Zarrs):
    name = "zarrs buffered"
    setting = "the same through the page cache, which is its default"
    direct_io = False


class ZarrsLargeShards(Zarrs):
    name, store = "zarrs, 512 a shard", "zarr-512"
    setting = "64 slices a call, direct_io; fewer indices to read"

    @property
    def array(self) -> str:
        return str(self.path)

    def write(self) -> None:
        import zarr

        clips, n_rows = self.clips, min(512, self.clips.n_clips)
        array = zarr.create_array(
            self.path,
            shape=(clips.n_clips, clips.n_patches, clips.dim),
            chunks=(1, clips.n_patches, clips.dim),
            shards=(n_rows, clips.n_patches, clips.dim),
            dtype="f2",
            compressors=None,
            filters=None,
        )
        for rows in clips.blocks(n_rows):
            array[rows.start : rows.stop] = clips.rows(rows)


def _many_rows(array: Any, rows: np.ndarray) -> Any:
    """An indexer over rows that do not follow each other, each as a slice of its own."""
    from zarr.core.indexing import BasicIndexer, Indexer

    class ManyRows(Indexer):
        shape = (len(rows), *array.shape[1:])
        drop_axes = ()

        def __iter__(self) -> Iterator[Any]:
            for slot, row in enumerate(rows.tolist()):
                selection = (slice(row, row + 1),)
                for part in BasicIndexer(selection, array.shape, array.metadata.chunk_grid):
                    place = (slice(slot, slot + 1), *part[2][1:])
                    yield part._replace(out_selection=place)

    return ManyRows()


PEERS: tuple[type[Peer], ...] = (
    H5pyDirect,
    H5pyFancy,
    WebDataset,
    LitData,
    HuggingFace,
    HuggingFaceNumpy,
    ZarrPython,
    ZarrPythonOindex,
    Zarrs,
    ZarrsBuffered,
    ZarrsLargeShards,
)


@contextmanager
def torch_threads(n_threads: int) -> Iterator[None]:
    """That many threads inside torch's operations."""
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
