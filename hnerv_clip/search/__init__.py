"""Find by text or by region: rankings, heat maps, and an index over many videos."""

DISTINGUISHED = 2.0  # standard score (`maps.match_scores`) from which a text is told from others


def match_words(text: str, best: float) -> str:
    """Whether a text has a match in a video, by the standard score of its best hit."""
    if best >= DISTINGUISHED:
        return f"“{text}”: best match {best:.1f}"
    return (f"“{text}” has no match in this video: its best place has {best:z.1f}, and only from "
            f"{DISTINGUISHED:g} on is a text distinguished from others")
