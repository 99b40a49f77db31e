"""The memory planner: predict a run's memory use before anything is loaded, and find settings that fit."""
