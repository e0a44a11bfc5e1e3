"""Words that no text of the project has: docs/glossary.md has better ones, or they have to be read twice."""

RETIRED = r"\b(foret(?:old|ell\w*)|rehears\w*|dramas?|payers|the show|so many|in the midst)\b|(?<!com)promis(?:e|ing)"
"""Comments, docstrings, messages, and names of all kinds: those of metrics and of fields in files, too."""
