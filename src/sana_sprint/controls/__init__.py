"""Controls: from any picture to what a control branch follows.

Lines are (H,W) fp32, 1 = line and 0 = none; what the branch gets are pictures (1,3,H,W) in [-1,1].
"""

from sana_sprint.controls.edges import canny, soft_edges
from sana_sprint.controls.filters import blur, dilate, erode
from sana_sprint.controls.kinds import ANNOTATORS, KINDS, BlankPictureError, check_kind
from sana_sprint.controls.picture import Picture, condition, condition_for, open_picture
from sana_sprint.controls.scribble import redraw, scribble, to_scribble

__all__ = [
    "ANNOTATORS",
    "KINDS",
    "BlankPictureError",
    "Picture",
    "blur",
    "canny",
    "check_kind",
    "condition",
    "condition_for",
    "dilate",
    "erode",
    "open_picture",
    "redraw",
    "scribble",
    "soft_edges",
    "to_scribble",
]
