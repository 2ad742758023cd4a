"""The tasks that models are scored on; `registry` lists them, `templates` has their prompts."""
