"""Segmenters: from images to masks."""
