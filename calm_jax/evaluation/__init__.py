"""Scoring runs on tasks (`runner`), and the page of an experiment (`report`)."""
