"""What the sweep of λ and warm-up says, in words: the page of the trade-off."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from hnerv_clip.book import results
from hnerv_clip.book.markdown import Markup, join_words
from hnerv_clip.paths import resolve_path


def read_trade_off(runs: pd.DataFrame, video: str) -> pd.DataFrame:
    """`results.trade_off`, with the epochs of its runs."""
    return results.trade_off(runs, video).assign(epochs=runs[runs.video == video].epochs.max())


def near_best(swept: Iterable[pd.DataFrame], *, margin: float = 0.01) -> Markup:
    """At which λ the cosine is within `margin` of the best and PSNR highest, in bold; its values.

    Args:
        swept: tables of `read_trade_off`, each of other epochs.
    """
    where: dict[str, list[str]] = {}
    values, all_near = [], True
    for rows in swept:
        best, weights = rows.clip_centred_held_out.max(), rows.clip_loss_weight
        near = rows[rows.clip_centred_held_out >= best - margin]
        found = near.loc[near.psnr_held_out_db.idxmax()]
        least = found.clip_loss_weight == weights[weights > 0].min()
        cost = f" (PSNR {found.cost_held_out.words('dB')})" if found.cost_held_out else ""
        where.setdefault(found.setting + (", the smallest tried" if least else ""), []).append(
            f"after {found.epochs:g} epochs{cost}")
        values.append(f"{found.clip_centred_held_out:.3f} (best {best:.3f})")
        all_near &= len(near) == len(rows)
    (first, after), *others = where.items()
    said = [f"At {first}, the mean-centered cosine is within {margin:g} of the best "
            f"{join_words(after)}", *(f"at {setting}, {join_words(a)}" for setting, a in others)]
    return Markup(f"**{'; '.join(said)}.** It is {join_words(values)}."
                  + (f" All other settings are within {margin:g}, too." if all_near else ""))


def seeds_words(rows: pd.DataFrame) -> str:
    """How far seeds of one setting differ, beside the settings: what may be chance.

    Args:
        rows: of `read_trade_off`.
    """
    most = rows.loc[rows.n.idxmax()]
    if most.n == 1:
        return "Each setting has one seed, so the order of neighboring ones may be chance."
    base = rows[rows.is_base_warmup]
    cosine, psnr = "clip_centred_held_out", "psnr_held_out_db"
    sure = most.cost_held_out is not None and most.cost_held_out.outcome == "lower"
    return (f"{(rows.n == 1).sum()} of {len(rows)} settings have one seed. The {most.n} seeds of "
            f"{most.setting} differ by up to {np.ptp(most[f'{cosine}_seeds']):.3f} in cosine and "
            f"{np.ptp(most[f'{psnr}_seeds']):.2f} dB in PSNR on held-out frames, all λ of this "
            f"warm-up by up to {np.ptp(base[cosine]):.3f} and {np.ptp(base[psnr]):.2f} dB. The "
            "order of settings that differ no more than seeds do may be chance"
            + (f"; that {most.setting} costs PSNR is not: its interval excludes 0."
               if sure else "."))


def repeated_words(swept: pd.DataFrame, folder: str | Path) -> str:
    """`results.repeated_words`, and the smallest λ of page 5, which asks about the same."""
    said = results.repeated_words(swept, folder)
    if not said:
        return ""
    tried = pd.read_csv(resolve_path(folder) / "ablations.csv").clip_loss_weight
    return f"{said} Its smallest λ above 0 is {tried[tried > 0].min():g}."
