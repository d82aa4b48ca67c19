"""Plots as SVG that are the same every time: bars, lines, heat maps. No torch, and nothing of ours but errors."""
