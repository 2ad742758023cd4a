"""Scoring a run on tasks (`runner`), and turning the runs of an experiment into a page (`report`)."""
