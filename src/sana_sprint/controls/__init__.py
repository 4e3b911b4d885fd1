"""Controls: pictures that a control branch follows, made from pictures of any kind.

Lines are (H,W) fp32, 1 = line and 0 = none; a control picture is (1,3,H,W) in [-1,1].
"""

from sana_sprint.controls.edges import canny, soft_edges
from sana_sprint.controls.filters import blur, dilate, erode
from sana_sprint.controls.kinds import ANNOTATORS, BUILT_IN, KINDS, BlankPictureError, check_kind
from sana_sprint.controls.picture import Picture, control_picture, control_picture_for, open_picture
from sana_sprint.controls.scribble import redraw, scribble, to_scribble

__all__ = [
    "ANNOTATORS",
    "BUILT_IN",
    "KINDS",
    "BlankPictureError",
    "Picture",
    "blur",
    "canny",
    "check_kind",
    "control_picture",
    "control_picture_for",
    "dilate",
    "erode",
    "open_picture",
    "redraw",
    "scribble",
    "soft_edges",
    "to_scribble",
]
