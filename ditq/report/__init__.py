"""The quality report: what was lost, measured on real samples, and one HTML file that shows it."""
