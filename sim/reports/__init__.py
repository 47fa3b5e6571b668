"""What people and programs look at: records as they are written, summaries, live views, metrics over HTTP."""
