"""The CLIP head of the original proposal: 1×1 convolutions, read at positions of the frame.

A 1×1 convolution commutes with picking positions, so the head runs only where it is asked; the
dense map exists on request.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hnerv_clip.patches import axis_cells, axis_shares, check_positions


class ClipHead(nn.Sequential):
    """1×1 convolution (n → 2n), ReLU, 1×1 convolution (2n → D), L2 normalization.

    Args:
        stages: the decoder stages that feed it, rising; their channels are concatenated.
        widths: channels of each of them.
        stage_hws: rows and columns of each of them.
        clip_dim: D.
        clip_pool: 0 to read one cell; else the side of the box around a position whose cells are
            averaged, as a share of the frame's height.
        frame_hw, padded_hw: the frame, and what the decoder's features cover.
        map_hw: cells of the dense map, those of the last stage that show the frame.
    """

    def __init__(self, stages: tuple[int, ...], *, widths: list[int],
                 stage_hws: list[tuple[int, int]], clip_dim: int, clip_pool: float,
                 frame_hw: tuple[int, int], padded_hw: tuple[int, int], map_hw: tuple[int, int]):
        width = sum(widths)
        super().__init__(nn.Conv2d(width, 2 * width, 1), nn.ReLU(),
                         nn.Conv2d(2 * width, clip_dim, 1))
        self.stages, self.widths, self.stage_hws = stages, widths, stage_hws
        self.clip_pool, self.map_hw = clip_pool, map_hw
        self.frame_hw, self.padded_hw = frame_hw, padded_hw

    def at(self, stages: list[Tensor], centres: Tensor) -> Tensor:
        """Embeddings at positions of the frame: the values of the dense map there.

        Args:
            stages: what `HNeRV.stages` returned, at least up to the last one that feeds the head.
            centres: [P, 2], or [B, P, 2] for positions of each frame, (y, x) in frame pixels.
        Returns:
            [B, P, D] unit vectors, float32.
        Raises:
            ValueError: a position outside the frame.
        """
        check_positions(centres, self.frame_hw)
        return self.at_cells(stages, self.cells(centres))

    def cells(self, centres: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Where `at` looks, for `at_cells`: computed once, used in every step.

        Returns:
            Of each stage that feeds the head, (rows, columns): int64 [..., P] cells, or with
            `clip_pool` the share of every row and column, [..., P, Hᵢ] and [..., P, Wᵢ].
        """
        return [tuple(self._axis(centres[..., axis], axis, stage_hw) for axis in (0, 1))
                for stage_hw in self.stage_hws]

    def at_cells(self, stages: list[Tensor], cells: list[tuple[Tensor, Tensor]]) -> Tensor:
        """`at` for what `cells` returned: nothing here waits for the GPU."""
        picked = []
        for stage, (rows, cols) in zip(self.stages, cells, strict=True):
            features = stages[stage]
            if self.clip_pool:  # as products: rows, then columns
                picks = _weigh_rows(features, rows)  # [B, P, W, C]
                picks = (picks * cols.to(picks.dtype)[..., None]).sum(-2).transpose(1, 2)
            else:  # from channels-last memory: else its gradient would be laid out anew, and slowly
                frame = slice(None) if rows.ndim == 1 else \
                    torch.arange(len(rows), device=rows.device)[:, None]
                picks = features.permute(0, 2, 3, 1)[frame, rows, cols].transpose(1, 2)
            picked.append(picks)  # [B, Cᵢ, P]
        return self.of_cells(picked)

    def of_cells(self, picked: list[Tensor]) -> Tensor:
        """Embeddings [B, P, D] from what the stages that feed the head have there: [B, Cᵢ, P]."""
        read = [picks[:, :width].float() for width, picks in zip(self.widths, picked, strict=True)]
        return self._vectors(torch.cat(read, dim=1)[..., None])[..., 0].transpose(1, 2)

    def map(self, stages: list[Tensor], *, stride: int = 1, rows: slice = slice(None)) -> Tensor:
        """Embeddings at every `stride`-th cell of the last stage: [B, D, ⌈H'/stride⌉, ⌈W'/stride⌉].

        Args:
            stages: what `HNeRV.stages` returned, at least up to the last one that feeds the head.
            rows: only these rows of the map.
        """
        device, picked = stages[0].device, []
        positions = [(torch.arange(stride // 2, cells, stride, device=device) + 0.5)
                     * (length / cells)
                     for cells, length in zip(self.map_hw, self.frame_hw, strict=True)]
        positions[0] = positions[0][rows]
        for stage, width, stage_hw in zip(self.stages, self.widths, self.stage_hws, strict=True):
            ys, xs = (self._axis(positions[axis], axis, stage_hw) for axis in (0, 1))
            if self.clip_pool:
                picks = _weigh_rows(stages[stage], ys)
                picks = torch.matmul(xs.to(picks.dtype), picks).permute(0, 3, 1, 2)
            else:
                picks = stages[stage][:, :, ys[:, None], xs]
            picked.append(picks[:, :width].float())
        return self._vectors(torch.cat(picked, dim=1))

    def _axis(self, positions: Tensor, axis: int, stage_hw: tuple[int, int]) -> Tensor:
        """Cells or shares of a stage's rows (axis 0) or columns (1) at positions in pixels."""
        length, cells = self.padded_hw[axis], stage_hw[axis]
        if not self.clip_pool:
            return axis_cells(positions, length, cells)
        return axis_shares(positions, self.clip_pool * self.frame_hw[0], length, cells,
                           frame=self.frame_hw[axis])

    def _vectors(self, picked: Tensor) -> Tensor:
        """[B, n, h, w] float32 to unit vectors [B, D, h, w]."""
        return F.normalize(self(picked), dim=1)


def _weigh_rows(features: Tensor, rows: Tensor) -> Tensor:
    """Sums of the rows of [B, C, H, W] by weights [P, H] or [B, P, H]: [B, P, W, C]."""
    columns = features.permute(0, 2, 3, 1).flatten(2)  # [B, H, W·C], a view in channels-last
    return torch.matmul(rows.to(features.dtype), columns).unflatten(2, (features.shape[3], -1))
