"""One HTML file: figures + tables -> a page."""
