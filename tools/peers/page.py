"""The table of docs/peers.md: markdown between markers, and the same as JSON beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ABOVE, BELOW = 0.1, 1.0  # bits a weight by which a ditq row may lie above or below a peer and count as equal
BEGIN, END = "<!-- table {} -->", "<!-- end {} -->"

HEADER = ["method", "bits a weight", "bits with modulation", "online bits", "a", "PSNR, dB", "worst", "SSIM", "ST-LPIPS",
          "latent error", "layer SQNR, dB", "compile, min", "memory, MB"]  # fmt: skip


def beaten(peer: dict[str, Any], ours: Sequence[dict[str, Any]]) -> bool:
    """Does this peer's row win against ditq at equal bits?

    Among ditq's rows that store no more for weights and for modulation and quantize activations at least as much, none
    reaches its PSNR; and there is such a row with nearly as many bits.
    """
    equal = [
        row
        for row in ours
        if row["bits"] <= peer["bits"] + ABOVE
        and row["modulation"] <= peer["modulation"] + ABOVE
        and row["activation"] <= peer["activation"]
    ]
    near = any(row["bits"] >= peer["bits"] - BELOW for row in equal)
    return near and max(row["psnr"] for row in equal) < peer["psnr"]


def line(row: dict[str, Any], bold: bool) -> str:
    if "failed" in row:
        return f"| {row['name']} | cannot run: {row['failed']} |" + " |" * (len(HEADER) - 2)
    perceptual = "not installed" if row["st_lpips"] is None else f"{row['st_lpips']:.4f}"
    sqnr = "" if row["layer_sqnr"] is None else f"{row['layer_sqnr']:.1f}"
    cells = [
        row["name"],
        f"{row['bits']:.2f}",
        f"{row['bits_all']:.2f}",
        f"{row['online']:.2f}",
        str(row["activation"]),
        f"{row['psnr']:.2f} ± {row['psnr_error']:.2f}",
        f"{row['psnr_worst']:.2f}",
        f"{row['ssim']:.4f}",
        perceptual,
        f"{row['latent_error']:.2e}",
        sqnr,
        f"{row['compile_cpu_minutes']:.2f}",
        f"{row['compile_peak_mb']:.0f}",
    ]
    return "| " + " | ".join(f"**{cell}**" if bold and cell else cell for cell in cells) + " |"


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown of one checkpoint's rows; peers that win against ditq at equal bits in bold."""
    ours = [row for row in results if row["peer"] == "ditq" and "failed" not in row]
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    for row in results:
        bold = row["peer"] != "ditq" and "failed" not in row and beaten(row, ours)
        lines.append(line(row, bold))
    covered = [row for row in results if "failed" not in row]
    text = "\n".join(lines)
    for row in covered:
        if row["note"]:
            text += f"\n\n*{row['name']}*: {row['note']}"
    if covered:
        partly = [row for row in covered if row["covers"]["left"]]
        pictures = sorted({row["pictures"] for row in covered})
        text += f"\n\n{covered[0]['covers']['token'].split('/')[1]} token linears, pictures: {', '.join(map(str, pictures))}."
        for row in partly:
            text += f" *{row['name']}* leaves {', '.join(row['covers']['left'])}."
    return text


def fill(page: Path, variant: str, text: str) -> bool:
    """Put the table between the page's markers for this variant; False where the page has none."""
    begin, end = BEGIN.format(variant), END.format(variant)
    content = page.read_text(encoding="utf-8")
    if begin not in content or end not in content:
        return False
    head, _, rest = content.partition(begin)
    tail = rest.partition(end)[2]
    page.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")
    return True


def joined(path: Path, variant: str, results: Sequence[dict[str, Any]], order: Sequence[str]) -> list[dict[str, Any]]:
    """These rows, and those of the variant in the JSON file that were not measured now; in that order of names."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows = {row["name"]: row for row in (*content.get(variant, []), *results)}
    places = {name: place for place, name in enumerate(order)}
    return sorted(rows.values(), key=lambda row: places.get(row["name"], len(places)))


def write_json(path: Path, variant: str, results: Sequence[dict[str, Any]]) -> None:
    """The variant's rows in a JSON file that holds all variants."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content[variant] = list(results)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
