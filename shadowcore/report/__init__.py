"""What a study looks like: tables, pages, plots, timelines."""
