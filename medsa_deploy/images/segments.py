"""Names of labels and a user's styles → segments: each label's name, codes and colour."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .class_codes import SegmentStyle
from .label_colours import Rgb, label_colour
from .structure_codes import StructureCodes, structure_codes

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One label, as viewers show it."""

    label: int
    name: str
    codes: StructureCodes
    colour: Rgb


@dataclass(frozen=True, kw_only=True)
class SegmentationDetails:
    """What a segmentation says beside its voxels.

    >>> SegmentationDetails(bundle="liver.medsa").automatic
    False
    """

    tool: str = "medsa-deploy"
    styles: Mapping[str, SegmentStyle] = field(default_factory=dict)
    """Name of a label → codes and a colour of the user's choice."""
    bundle: str | None = None
    """Name of the bundle that computed the labels."""
    bundle_sha256: str | None = None
    """SHA-256 of the bundle's manifest, which lists the SHA-256 of every file."""
    automatic: bool = False
    """Whether nobody gave prompts for this very volume."""
    identity: str | None = None
    """DICOM: the UIDs of what is written derive from this text, the bundle and the source; None for
    new UIDs."""


def segments(
    count: int, names: Sequence[str], styles: Mapping[str, SegmentStyle]
) -> tuple[Segment, ...]:
    """Labels 1…`count`, or of every name if there are more; at least one.

    A name without codes is "Tissue"; see `warn_of_unknown`.

    >>> segments(1, ["spleen"], {})[0].codes.type.meaning
    'Spleen'
    """
    described = []
    for label in range(1, max(count, len(names), 1) + 1):
        name = names[label - 1] if label <= len(names) else f"segment {label}"
        style = styles.get(name, SegmentStyle())
        codes = style.codes or structure_codes(name)
        described.append(
            Segment(
                label=label,
                name=name,
                codes=codes or StructureCodes(),
                colour=style.colour or label_colour(label),
            )
        )
    return tuple(described)


def warn_of_unknown(segments: Sequence[Segment]) -> None:
    """Log the names that no codes are known for, in a format whose readers go by codes."""
    unknown = [repr(segment.name) for segment in segments if segment.codes == StructureCodes()]
    if unknown:
        logger.warning(
            "no codes are known for %s: viewers will call it tissue; give codes with "
            "--class-codes, or in the prompts file",
            ", ".join(unknown),
        )
