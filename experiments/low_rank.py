"""`python -m experiments.low_rank`: the singular value decomposition, its truncation error, two ways to split it.

The splits are factors of the library's LoRA layer: the same product from factors of equal size and a one-sided pair.
"""

import math
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call

from experiments.figure import BLUE, GREEN, ORANGE, drawn
from experiments.shared import largest_error
from experiments.study import Claim, Log, Numbers, Options, Study, main, table
from llama_ft.techniques.lora import LoRALinear

SIDE = 128  # of the pictures, pixels
KEPT = (1, 2, 5, 10, 20)  # numbers of singular values shown in the figure
RANK = 8
SMALL_SIDE, SMALL_RANK = 16, 4  # of the layer whose curvature is computed
EXACT = 1e-10  # relative, in fp64
SPREAD = (100.0, 1.0)  # the largest and the smallest singular value of the split product


def measure(options: Options, log: Log) -> Numbers:
    """Decompose, truncate, split."""
    log("a picture, a flat spectrum, two splits")
    return {
        "picture": decomposition(picture()),
        "flat": decomposition(random_orthogonal(SIDE, SIDE, 1)),
        "product": rank_of_a_product(),
        "balanced": split(balanced=True),
        "one_sided": split(balanced=False),
    }


def picture() -> Tensor:
    """A scene with a sky gradient, hills, a sun and a fence: fp64 [SIDE, SIDE], 0 to 1."""
    across = torch.linspace(0, 1, SIDE, dtype=torch.float64)
    down = across[:, None]
    image = 0.9 - 0.4 * down.expand(SIDE, SIDE)
    sun = (across - 0.75).square() + (down - 0.25).square() < 0.01
    image = torch.where(sun, 1.0, image)
    hills = 0.65 + 0.08 * torch.sin(7 * across) + 0.04 * torch.sin(17 * across + 1)
    image = torch.where(down > hills, 0.25 + 0.2 * down, image)
    fence = (across * 16 % 1 < 0.25) & (down > 0.8) & (down < 0.93)
    return torch.where(fence, 0.05, image)


def random_orthogonal(rows: int, columns: int, seed: int) -> Tensor:
    """A matrix with orthonormal columns: fp64 [rows, columns]."""
    generator = torch.Generator().manual_seed(seed)
    orthogonal: Tensor = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q
    return orthogonal


def decomposition(matrix: Tensor) -> Numbers:
    """Orthogonality of the factors, singular values, and the error of each truncation, measured and by formula."""
    u, values, v = torch.linalg.svd(matrix)
    eye, norm, sizes = torch.eye(len(matrix), dtype=matrix.dtype), matrix.norm(), range(1, len(values))
    thin = u[:, :RANK]
    errors = [(((u[:, :k] * values[:k]) @ v[:k] - matrix).norm() / norm).item() for k in sizes]
    formula = [(values[k:].norm() / norm).item() for k in sizes]
    return {
        "orthogonality_error": max((u @ u.T - eye).abs().max().item(), (v @ v.T - eye).abs().max().item()),
        "thin_columns_error": (thin.T @ thin - eye[:RANK, :RANK]).abs().max().item(),
        "thin_rows_error": (thin @ thin.T - eye).abs().max().item(),
        "values": values.tolist(),
        "errors": errors,
        "formula_error": max(abs(error - expected) for error, expected in zip(errors, formula, strict=True)),
    }


def rank_of_a_product() -> dict[str, float]:
    """The 8th and 9th singular values of B A for factors of rank 8, relative to the first."""
    generator = torch.Generator().manual_seed(2)
    b, a = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((SIDE, RANK), (RANK, SIDE)))
    values = torch.linalg.svdvals(b @ a)
    return {"last_of_rank": (values[RANK - 1] / values[0]).item(), "next": (values[RANK] / values[0]).item()}


def split_layer(balanced: bool, side: int = SIDE, rank: int = RANK) -> tuple[LoRALinear, Tensor]:
    """A LoRA layer whose update is a given product, split evenly or one-sidedly; and the product."""
    u, v = random_orthogonal(side, rank, 3), random_orthogonal(side, rank, 4)
    values = torch.logspace(math.log10(SPREAD[0]), math.log10(SPREAD[1]), rank, dtype=torch.float64)
    left, right = (values.sqrt(), values.sqrt()) if balanced else (torch.ones_like(values), values)
    base = torch.nn.Linear(side, side, bias=False, dtype=torch.float64)
    torch.nn.init.zeros_(base.weight).requires_grad_(False)
    layer = LoRALinear(base, rank, float(rank), dtype=torch.float64)  # a scale of 1
    with torch.no_grad():
        layer.lora_B.copy_(u * left)
        layer.lora_A.copy_(right[:, None] * v.T)
    return layer, (u * values) @ v.T


def split(balanced: bool) -> dict[str, float]:
    """Conditioning of the factors, and of a loss whose goal is the product or near it."""
    layer, product = split_layer(balanced)
    output: Tensor = layer(torch.eye(SIDE, dtype=torch.float64))
    goal = product + random_orthogonal(SIDE, SIDE, 5)  # away from the product in all directions
    loss = (output - goal.T).square().sum() / 2
    to_a, to_b = (gradient.norm().item() for gradient in torch.autograd.grad(loss, [layer.lora_A, layer.lora_B]))
    return {
        "product_error": largest_error(output, product.T),
        "condition_a": torch.linalg.cond(layer.lora_A).item(),
        "condition_b": torch.linalg.cond(layer.lora_B).item(),
        "gradient_b_over_a": to_b / to_a,
        "curvature": curvature(balanced),
    }


def curvature(balanced: bool) -> float:
    """The largest eigenvalue of the loss's Hessian at its goal: gradient descent needs a rate below 2 divided by it.

    Computed for a layer small enough for the whole Hessian, with the same largest and smallest singular value.
    """
    layer, product = split_layer(balanced, SMALL_SIDE, SMALL_RANK)
    inputs, n = torch.eye(SMALL_SIDE, dtype=torch.float64), layer.lora_A.numel()

    def loss(flat: Tensor) -> Tensor:
        factors = {"lora_A": flat[:n].view_as(layer.lora_A), "lora_B": flat[n:].view_as(layer.lora_B)}
        half: Tensor = (functional_call(layer, factors, (inputs,)) - product.T).square().sum() / 2
        return half

    flat = torch.cat([layer.lora_A.detach().flatten(), layer.lora_B.detach().flatten()])
    hessian = torch.autograd.functional.hessian(loss, flat)
    return float(torch.linalg.eigvalsh(hessian)[-1])


def claims_of(numbers: Numbers) -> list[Claim]:
    """The claims, checked against the numbers."""
    return [
        *_truncation_claims(numbers["picture"], numbers["flat"], numbers["product"]),
        *_split_claims(numbers["balanced"], numbers["one_sided"]),
    ]


def _truncation_claims(image: Numbers, flat: Numbers, product: Numbers) -> list[Claim]:
    orthogonality, formula = (max(image[key], flat[key]) for key in ("orthogonality_error", "formula_error"))
    half = flat["errors"][SIDE // 2 - 1]
    return [
        Claim(
            "U times its transpose, and V times its, are the identity", orthogonality <= EXACT, {"error": orthogonality}
        ),
        Claim(
            f"of U cut to {RANK} columns only the transpose times U is still the identity, not U times its transpose",
            image["thin_columns_error"] <= EXACT and image["thin_rows_error"] >= 0.5,
            {"error": image["thin_columns_error"], "of the other": image["thin_rows_error"]},
        ),
        Claim(
            "the error of keeping k singular values is the norm of those left out, for every k",
            formula <= EXACT,
            {"error": formula},
        ),
        Claim(
            f"a picture of {SIDE} x {SIDE} is there to 3 percent with 10 of its {SIDE} singular values",
            image["errors"][9] <= 0.03,
            {"percent with 10": 100 * image["errors"][9]},
        ),
        Claim(
            "a product of rank 8 has 8 singular values, and nothing after them",
            product["next"] <= EXACT < product["last_of_rank"],
            {"8th over 1st": product["last_of_rank"], "9th over 1st": product["next"]},
        ),
        Claim(
            "where the spectrum is flat truncating does not work: half of the singular values leave 71 percent"
            " of error",
            abs(half - math.sqrt(0.5)) <= 1e-6,
            {"percent with half": 100 * half},
        ),
    ]


def _split_claims(even: Numbers, one_sided: Numbers) -> list[Claim]:
    error, largest = max(even["product_error"], one_sided["product_error"]), SPREAD[0]
    ratio = one_sided["gradient_b_over_a"] / even["gradient_b_over_a"]
    curvatures = (even["curvature"] / (2 * largest), one_sided["curvature"] / (largest**2 + 1))
    return [
        Claim(
            "B = U S^1/2, A = S^1/2 V^T and B = U, A = S V^T have the same product in the LoRA layer",
            error <= EXACT,
            {"error": error},
        ),
        Claim(
            "the balanced factors share the condition number out, the one-sided ones give all of it to A",
            math.isclose(even["condition_a"], even["condition_b"], rel_tol=1e-6)
            and math.isclose(one_sided["condition_a"], even["condition_a"] ** 2, rel_tol=1e-6)
            and math.isclose(one_sided["condition_b"], 1, rel_tol=1e-6),
            {"each, balanced": even["condition_a"], "of A, one-sided": one_sided["condition_a"]},
        ),
        Claim(
            "one-sided, the gradient of B is far larger beside that of A than balanced: 5 times or more",
            ratio >= 5,
            {"B over A, balanced": even["gradient_b_over_a"], "one-sided": one_sided["gradient_b_over_a"]},
        ),
        Claim(
            "the curvature that bounds the learning rate is 2 s balanced and s^2 + 1 one-sided, s the largest singular"
            " value",
            all(abs(value - 1) <= 1e-8 for value in curvatures),
            {"balanced": even["curvature"], "one-sided": one_sided["curvature"]},
        ),
    ]


def table_of(numbers: Numbers) -> str:
    """The two splits' numbers."""
    keys = list(numbers["balanced"])
    rows = [[name, *(numbers[name][key] for key in keys)] for name in ("balanced", "one_sided")]
    return table(("", *(key.replace("_", " ") for key in keys)), rows)


def draw(numbers: Numbers, file: Path) -> None:
    """Draw the truncated picture, and the error against the number of singular values kept."""
    image = picture()
    u, values, v = torch.linalg.svd(image)
    with drawn(file, ("the first k singular values", "error of keeping k of them")) as (left, right):
        panels = {f"k = {k}": (u[:, :k] * values[:k]) @ v[:k] for k in KEPT} | {"the picture": image}
        gap = SIDE + 8
        left.set(xlim=(0, 3 * gap - 8), ylim=(2 * gap + 12, -18))
        for index, (name, panel) in enumerate(panels.items()):
            x, y = index % 3 * gap, index // 3 * (gap + 18)
            left.imshow(panel.clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1, extent=(x, x + SIDE, y + SIDE, y))
            left.text(x, y - 4, name)
        left.axis("off")
        kept = range(1, SIDE)
        right.plot(kept, numbers["picture"]["errors"], color=BLUE, lw=3, label="the picture")
        right.plot(kept, numbers["flat"]["errors"], color=ORANGE, lw=3, label="a flat spectrum")
        right.plot([10], [numbers["picture"]["errors"][9]], "o", color=GREEN, ms=10, label="10 of the picture's")
        right.set(xlabel="k", ylabel="relative error", ylim=(0, 1.05))
        right.legend(frameon=False, loc="center left", bbox_to_anchor=(0.08, 0.35))


STUDY = Study("low_rank", Options, measure, claims_of, table_of, draw)

if __name__ == "__main__":
    main(STUDY)
