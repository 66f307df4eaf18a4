"""Commands for those who work on ditq; they are not part of what is installed."""
