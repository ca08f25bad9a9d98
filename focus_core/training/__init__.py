"""Train candidate projections: pure objectives, a seeded example stream, and the loop."""
