"""Settings of loading the weights: where the tensors go, how the file is read, and changed metadata."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

LoadMode = Literal["auto", "none", "mmap", "mlock", "mmap+mlock", "dio"]


class LoadConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Buffers of the tensors, the way in which the file is read, and overrides of its metadata.

    The draft model shares all settings except the placement of tensors, for which `DraftConfig` has fields.
    """

    override_tensor: Annotated[
        tuple[str, ...],
        Meta(
            description="tensors whose names match a regular expression go to a buffer, as in exps=CPU, separated by "
            "commas; the first match counts, before --n-cpu-moe, --n-cpu-ffn and --cpu-moe"
        ),
    ] = ()
    cpu_moe: Annotated[bool, Meta(description="keep the experts of all layers in the memory of the CPU")] = False
    n_cpu_moe: Annotated[
        int, Meta(ge=0, le=10_000, description="first layers whose experts stay in the memory of the CPU")
    ] = 0
    n_cpu_ffn: Annotated[
        int,
        Meta(
            ge=0,
            le=10_000,
            description="first layers whose dense feed-forward weights stay in the memory of the CPU",
        ),
    ] = 0
    load_mode: Annotated[
        LoadMode,
        Meta(
            description="how the file is read: mmap maps it, none reads it into buffers, mlock also keeps these in "
            "RAM, mmap+mlock maps it and keeps it in RAM, dio bypasses the page cache, auto maps it if all devices can "
            "use the mapped file"
        ),
    ] = "auto"
    mmap: Annotated[bool | None, Meta(description="--mmap is --load-mode mmap, --no-mmap is --load-mode none")] = None
    mlock: Annotated[
        bool, Meta(description="keep the weights in RAM: --load-mode mmap+mlock, or mlock if --no-mmap is given")
    ] = False
    direct_io: Annotated[bool, Meta(description="the same as --load-mode dio")] = False
    lazy_mode: Annotated[
        Literal["on", "auto", "off"],
        Meta(
            description="read rows of tensors that the model only looks up from the mapped file on demand; auto is for "
            "tensors of more than 4 GiB"
        ),
    ] = "auto"
    override_kv: Annotated[
        tuple[str, ...],
        Meta(
            description="metadata of the file to replace, as KEY=TYPE:VALUE with the type int, float, bool or str, "
            "separated by commas"
        ),
    ] = ()
    check_tensors: Annotated[bool, Meta(description="refuse a file with invalid values in its weights")] = False
    repack: Annotated[
        bool, Meta(description="rearrange weights for the kernels of the CPU; always off with --deterministic")
    ] = True
    no_host: Annotated[
        bool, Meta(description="use no pinned host memory of a GPU for weights, but the CPU's buffers")
    ] = False
    rpc: Annotated[
        tuple[str, ...],
        Meta(description="RPC servers that compute layers, as HOST:PORT, separated by commas; needs an RPC build"),
    ] = ()

    @property
    def mode(self) -> LoadMode:
        """The load mode of all flags together. Raises ValueError, with two flags, if they contradict each other."""
        modes: dict[str, LoadMode] = {}
        if self.load_mode != "auto":
            modes[f"--load-mode {self.load_mode}"] = self.load_mode
        if self.direct_io:
            modes["--direct-io"] = "dio"
        if self.mlock:
            modes["--mlock"] = "mlock" if self.mmap is False else "mmap+mlock"
        elif self.mmap is not None:
            modes["--mmap" if self.mmap else "--no-mmap"] = "mmap" if self.mmap else "none"
        if len(set(modes.values())) > 1:
            raise ValueError(f"{' and '.join(modes)} contradict each other; leave one of them out")
        return next(iter(modes.values()), "auto")
