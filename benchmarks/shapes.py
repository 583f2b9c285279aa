"""What contexts of well-known shapes take, computed from their configurations: nothing is measured, no model is loaded.

python benchmarks/shapes.py    # the table of docs/models.md
"""

from __future__ import annotations

from typing import NamedTuple

TOKENS = (8_192, 32_768, 131_072)
RATIO = 0.3
PAIR_EXTRA = 6  # bytes of a kept pair's position and score


class Shape(NamedTuple):
    """A model in bfloat16.

    Attributes:
        name: a checkpoint of this shape.
        parameters: that a token passes through.
        layers: with full attention.
        sliding: layers with sliding windows, and their window.
        heads: KV heads of a layer.
        query_heads: query heads of a layer.
        dim: head dimension.
    """

    name: str
    parameters: float
    layers: int
    sliding: tuple[int, int]
    heads: int
    query_heads: int
    dim: int


SHAPES = (
    Shape("Llama-3.2-1B", 1.24e9, 16, (0, 0), 8, 32, 64),
    Shape("Llama-3.1-8B", 8.03e9, 32, (0, 0), 8, 32, 128),
    Shape("Gemma-3-27B", 27.0e9, 10, (52, 1024), 16, 32, 128),
)


def dense_nbytes(shape: Shape, tokens: int) -> int:
    pair = 4 * shape.dim * shape.heads
    return pair * (shape.layers * tokens + shape.sliding[0] * min(tokens, shape.sliding[1]))


def context_nbytes(shape: Shape, tokens: int) -> int:
    pair = 4 * shape.dim + PAIR_EXTRA
    sliding = shape.sliding[0] * shape.heads * min(tokens, shape.sliding[1]) * (4 * shape.dim + 4)
    return round(RATIO * tokens * shape.layers * shape.heads * pair) + sliding + 4 * tokens


def prefill_flops(shape: Shape, tokens: int) -> float:
    """Of one forward over the text: products with weights, and attention over half of what stands before each token."""
    full = 4 * shape.query_heads * shape.dim * shape.layers * tokens * tokens / 2
    sliding = 4 * shape.query_heads * shape.dim * shape.sliding[0] * tokens * min(tokens / 2, shape.sliding[1])
    return 2 * shape.parameters * tokens + full + sliding


def repeat_flops(shape: Shape, tokens: int, chunk: int = 500) -> float:
    """Of the repeat: each chunk attends to itself and its original, whatever the text's length."""
    attention = 4 * shape.query_heads * shape.dim * shape.layers * tokens * 1.5 * chunk
    sliding = 4 * shape.query_heads * shape.dim * shape.sliding[0] * tokens * min(1.5 * chunk, shape.sliding[1])
    return 2 * shape.parameters * tokens + attention + sliding


def main() -> None:
    print("| shape of | tokens | dense cache | context at 0.3 | prefill | build / prefill |")
    print("|---|---|---|---|---|---|")
    for shape in SHAPES:
        for tokens in TOKENS:
            dense, kept, read = dense_nbytes(shape, tokens), context_nbytes(shape, tokens), prefill_flops(shape, tokens)
            built = (read + repeat_flops(shape, tokens)) / read
            print(f"| {shape.name} | {tokens:,} | {dense / 1e9:.2f} GB | {kept / 1e9:.2f} GB | {read / 1e15:.2f} PFLOP | {built:.2f} |")


if __name__ == "__main__":
    main()
