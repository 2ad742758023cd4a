"""The tasks that models are scored on: `registry` lists them, `prompts` has their templates."""
