"""The row that describes a network family: everything that the exporters ask about it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from medsa_deploy.bundle.manifest import FamilyFacts, Network
from medsa_deploy.exporters.decoders import ADAPTERS as DECODER_ADAPTERS
from medsa_deploy.exporters.decoders import SAM_DECODER, TWO_WAY_MLP, DecoderKind
from medsa_deploy.exporters.guesses import Guess, Overrides
from medsa_deploy.exporters.key_check import checked
from medsa_deploy.exporters.layouts import MEDSA, FileLayout
from medsa_deploy.exporters.reference import ReferenceNetwork
from medsa_deploy.exporters.shapes import Shapes
from medsa_deploy.exporters.training import TrainingCode, codes_by_keys

UNUSED = re.compile(r"num_batches_tracked$|^pixel_(mean|std)$")
"""Keys that a checkpoint of any family may have and its network does not run."""
NO_KEY = re.compile(r"(?!)")


class ReadFacts(Protocol):
    """Shapes and options → facts; a fact that neither determines is added to `guesses`.

    `adapted`: the network has adapters or low-rank updates.
    """

    def __call__(
        self, shapes: Shapes, overrides: Overrides, guesses: list[Guess], *, adapted: bool
    ) -> FamilyFacts: ...


def low_rank_hides_size(shapes: Shapes) -> str | None:
    """The public Med-SA code's updates come with tables of one length."""
    if any(".lora_" in key for key in shapes):
        return (
            "a LoRA checkpoint does not show its image size (its tables always have 127 rows): "
            "give --image-size"
        )
    return None


@dataclass(frozen=True, kw_only=True)
class FamilyConventions:
    """Conventions that hold for a family whatever code trained it."""

    click_frame: int | None = None
    """Side of the frame that clicks are scaled to; None: the network's image size."""
    pad_points: int | None = None
    """Points that a prompt set is padded to, box corners included; None: SAM's rule."""
    pads: str = "the public Med-SA code"
    """The code that pads them."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One network family."""

    titles: Mapping[str, str]
    """The network's name in the manifest → its title in tables."""
    encoder_title: str
    noun: str
    """One of its networks, in a message: `this is a TinyViT`."""
    stems: tuple[str, ...]
    """Beginnings of keys that every whole checkpoint has."""
    recognises: Callable[[Shapes], bool]
    """Whether a file's keys show the family, low-rank factors included."""
    codes: Callable[[Shapes], tuple[TrainingCode, ...]] = codes_by_keys
    """The codes that may have trained a network of the family, the most likely first."""
    admits: Callable[[Shapes], bool] | None = None
    """Whether keys may be the family's, for families that are not always recognised; None: if they
    are recognised."""
    layout: FileLayout = MEDSA
    """How its files hold weights."""
    required_keys: Mapping[str, str]
    """The encoder's keys, with their shapes (`key_check.py`)."""
    optional_keys: Mapping[str, str] = field(default_factory=dict)
    adapters: Mapping[str, str] = field(default_factory=dict)
    """Kind of adapter that no other family has → a pattern of its keys."""
    unused_keys: re.Pattern[str] = NO_KEY
    """Keys that a checkpoint may have and its network does not run."""
    unused_keys_in_2d: re.Pattern[str] = NO_KEY
    facts: ReadFacts
    encoder_key: str = "image_encoder"
    """The beginning of the encoder's keys."""
    reference_encoder: Callable[[Network, Shapes], nn.Module]
    """The encoder as it was trained, without weights; its state dict has the checkpoint's keys."""
    fold_encoder: Callable[[Any, Network], nn.Module]
    """The reference encoder → the encoder that is exported, an equal function."""
    decoder: DecoderKind = SAM_DECODER
    conventions: FamilyConventions = FamilyConventions()
    hidden_size: Callable[[Shapes], str | None] = lambda shapes: None
    """Why a file does not show the image size and none can be guessed; None if that is not so."""
    classes_if_public: bool = False
    """Whether a network that the public Med-SA code trained has a mask for each class."""
    first_label: int | None = None
    """Number of the mask token of the background, if every later one is a class's and the classes
    exclude each other."""
    takes_slices: bool = False
    """Whether SD-Trans can run in it: 3D."""

    def checked(self, shapes: Shapes) -> Shapes:
        """`shapes`, fit to build a network from; CheckpointError lists what is missing or wrong."""
        form = self.decoder.two_way(shapes)
        return checked(
            shapes,
            required={**self.required_keys, **self.decoder.required_keys, **TWO_WAY_MLP[form]},
            optional={**self.optional_keys, **DECODER_ADAPTERS},
        )

    def possible_codes(self, shapes: Shapes) -> tuple[TrainingCode, ...]:
        """The codes that may have trained a network with these keys as one of the family."""
        admits = self.admits or self.recognises
        return self.codes(shapes) if admits(shapes) else ()

    def uses(self, key: str, *, in_3d: bool) -> bool:
        """Whether the network runs a key that its checkpoint may have."""
        unused = [UNUSED, self.unused_keys, *([] if in_3d else [self.unused_keys_in_2d])]
        return not any(pattern.search(key) for pattern in unused)

    def reference(self, network: Network, shapes: Shapes) -> ReferenceNetwork:
        """The network as it was trained, without weights."""
        prompt_encoder, mask_decoder = self.decoder.reference(network, shapes)
        return ReferenceNetwork(
            network,
            encoder=self.reference_encoder(network, shapes),
            encoder_key=self.encoder_key,
            prompt_encoder=prompt_encoder,
            mask_decoder=mask_decoder,
            leaving=self.leaving(network),
        )

    def leaving(self, network: Network) -> range:
        """The mask tokens whose masks are the decoder's output."""
        first = self.first_label or 0
        return range(first, first + network.masks)
