"""Pictures of lab 08c: sound over time and frequency, and clips that move for a few seconds."""

import io
from collections.abc import Mapping, Sequence

import numpy as np

from lora_lab.view.figures import _sequential, _styled
from lora_lab.view.style import INK, MUTED, new_figure


@_styled
def plot_spectrograms(
    panels: Mapping[str, tuple], *, said: Sequence[tuple] = (), title: str = "", columns: int = 3, width: float = 8.2, height: float = 2.3,
):  # fmt: skip
    """How loud each frequency is at each moment; dark is loud. All panels share one scale, from 60 decibels below the loudest moment up.

    panels  title -> (amplitudes (frames, frequencies), seconds, highest frequency in Hz)
    said    (second, text, right) for a single panel: what was heard there, written above it, with a × where it is wrong
    """
    panels = {name: (np.asarray(values, dtype=float), seconds, highest) for name, (values, seconds, highest) in panels.items()}
    if not panels or any(values.ndim != 2 for values, _, _ in panels.values()):
        raise ValueError(f"plot_spectrograms needs panels with amplitudes (frames, frequencies); found {[p[0].shape for p in panels.values()]}")
    if said and len(panels) > 1:
        raise ValueError(f"plot_spectrograms writes what was said above a single panel; found {len(panels)} panels")
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(width, rows * height + (0.35 if title else 0) + (0.3 if said else 0))
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    if title:
        figure.suptitle(title, x=0.008, ha="left", fontweight="bold", fontsize="large", color=INK)
    top = max(float(values.max()) for values, _, _ in panels.values())
    for axes in grid.ravel()[len(panels) :]:
        axes.set_visible(False)
    for i, (axes, (name, (values, seconds, highest))) in enumerate(zip(grid.ravel(), panels.items(), strict=False)):
        decibels = 20 * np.log10(np.maximum(values, 1e-3 * top) / top)
        axes.imshow(decibels.T, origin="lower", aspect="auto", extent=(0, seconds, 0, highest / 1000), cmap=_sequential(), vmin=-60, vmax=0,
                    interpolation="nearest")  # fmt: skip
        axes.grid(False)
        axes.set_title(name, fontsize="medium", pad=20 if said else None)
        axes.set_xlabel("seconds" if i + columns >= len(panels) else "")
        axes.set_ylabel("kHz" if i % columns == 0 else "")
    for second, text, right in said:
        axes.annotate(text if right else f"{text} ×", (second, 1), (0, 5), xycoords=axes.get_xaxis_transform(), textcoords="offset points", ha="center",
                      va="bottom", fontsize="small", color=INK if right else MUTED, fontweight="bold" if right else "normal")  # fmt: skip
    return figure


def show_clips(clips, alt: str, *, repeats: int = 4, seconds: float = 0.22, scale: int = 9, gap: int = 2) -> None:
    """Show clips (n, frames, rows, columns), from 0 to 1, side by side, moving; after `repeats` rounds the picture stands still.

    alt  what is to be seen; outside a notebook it is printed. Raises ValueError when it is empty or `clips` has another shape.
    """
    from IPython.display import display

    clips = np.asarray(clips, dtype=float)
    if clips.ndim != 4 or 0 in clips.shape:
        raise ValueError(f"show_clips needs clips (n, frames, rows, columns), at least one; found shape {clips.shape}")
    if not alt.strip():
        raise ValueError("show_clips needs an alt text: what is to be seen")
    display({"text/html": _moving(clips, alt, repeats, seconds, scale, gap), "text/plain": f"[clips: {alt}]"}, raw=True)


def _moving(clips: np.ndarray, alt: str, repeats: int, seconds: float, scale: int, gap: int) -> str:
    """An <img> with an animated GIF in it. Less than 5 seconds, as WCAG 2.2.2 asks of what moves by itself."""
    import base64
    import html

    from PIL import Image  # comes with matplotlib

    n, frames, rows, columns = clips.shape
    pages = []
    for frame in range(frames):
        sheet = np.full((rows, n * (columns + gap) - gap), 0.5)
        for k in range(n):
            sheet[:, k * (columns + gap) : k * (columns + gap) + columns] = clips[k, frame]
        pages.append(Image.fromarray((255 * sheet.clip(0, 1)).astype(np.uint8)).resize((sheet.shape[1] * scale, rows * scale), Image.Resampling.NEAREST))
    file = io.BytesIO()
    again = {"loop": repeats - 1} if repeats > 1 else {}  # GIF counts the rounds after the first, and takes 0 for: without end
    pages[0].save(file, format="GIF", save_all=True, append_images=pages[1:], duration=int(1000 * seconds), **again)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/gif;base64,{data}" alt="{html.escape(alt, quote=True)}" style="max-width: 100%; border-radius: 4px">'
