"""Lesson 01: the parts of a LLaMA, with the wrong versions that one writes easily."""

EXERCISES = {}
