"""Settings of the rotary position embeddings, for contexts longer than the training context."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

_YarnFactor = Annotated[float, Meta(ge=-1.0, le=1e6)]


class RopeConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Scaling of positions, for the model and the draft model."""

    scaling: Annotated[
        Literal["auto", "none", "linear", "yarn"],
        Meta(description="scaling of positions; auto is the model's own, or linear if the model has none"),
    ] = "auto"
    scale: Annotated[
        float, Meta(ge=0.0, le=1e6, description="factor by which the training context grows; 0 is the model's own")
    ] = 0.0
    freq_base: Annotated[float, Meta(ge=0.0, le=1e12, description="base of the frequencies; 0 is the model's own")] = (
        0.0
    )
    freq_scale: Annotated[
        float, Meta(ge=0.0, le=1e6, description="factor of the frequencies, 1 / --rope-scale; 0 is the model's own")
    ] = 0.0
    yarn_context: Annotated[
        int, Meta(ge=0, le=2**31 - 1, description="YaRN: training context before scaling; 0 is the model's own")
    ] = 0
    yarn_ext_factor: Annotated[
        _YarnFactor, Meta(description="YaRN: share of extrapolation; 0 interpolates only, -1 is the model's own")
    ] = -1.0
    yarn_attn_factor: Annotated[
        _YarnFactor, Meta(description="YaRN: factor of the attention scores; -1 is the model's own")
    ] = -1.0
    yarn_beta_slow: Annotated[
        _YarnFactor, Meta(description="YaRN: rotations up to which a dimension is interpolated; -1 is the model's own")
    ] = -1.0
    yarn_beta_fast: Annotated[
        _YarnFactor, Meta(description="YaRN: rotations from which no dimension is interpolated; -1 is the model's own")
    ] = -1.0

    @property
    def frequency_factor(self) -> float:
        """Factor of the frequencies; 0 is the model's own. Raises ValueError if it is set twice."""
        if self.scale and self.freq_scale:
            raise ValueError("--rope-scale and --rope-freq-scale set the same factor; leave one of them out")
        return self.freq_scale or (1 / self.scale if self.scale else 0.0)

    def scaled_context(self, unscaled: int, trained: int) -> int:
        """Returns the tokens of the training context after scaling. `unscaled` is the number without any scaling,
        `trained` the number with the model's own scaling."""
        factor = 0.0 if self.scaling == "none" else self.frequency_factor
        original = self.yarn_context if self.scaling == "yarn" else 0
        return round((original or unscaled) / factor) if factor else trained
