"""A colour for each expert: light enough for dark text, and told apart by readers with any colour vision if E <= 8."""

import colorsys

# Paul Tol's scheme "light" (technical note SRON/EPS/TN/09-002): fills behind dark text, safe for colour-blind readers.
EIGHT = ("#77aadd", "#ee8866", "#eedd88", "#ffaabb", "#99ddff", "#44bb99", "#bbcc33", "#aaaa00")
GOLDEN = 0.618034  # of a turn: neighbours, and all others, stay apart
LIGHTNESS = (0.72, 0.84, 0.62)


def expert_colours(num_experts: int) -> list[str]:
    """A colour `#rrggbb` for each expert. More than eight differ in hue and lightness; the page also says numbers."""
    if num_experts <= len(EIGHT):
        return list(EIGHT[:num_experts])
    found = []
    for e in range(num_experts):
        rgb = colorsys.hls_to_rgb(e * GOLDEN % 1, LIGHTNESS[e % len(LIGHTNESS)], 0.62)
        found.append("#" + "".join(f"{round(255 * value):02x}" for value in rgb))
    return found
