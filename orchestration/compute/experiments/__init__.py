"""What an experiment says: from the log of what was served and what people then did to a verdict in words.

declared    what experiments.toml declares
metrics     what is counted, and what a count means
reading     the served log joined to outcomes: a Panel of people by day
ratios      lift and standard error of a ratio, with people as the unit, variance reduced by what was known before
sequential  intervals that hold however often one looks
split       whether people were split as declared
planner     how many people and days a lift needs
decide      one verdict for each metric, guardrail and experiment, in words
analysis    all of it for one experiment
picture     the plot
stops       the record that switches an experiment off
templates   prompt templates: what was measured offline beside what people did
"""
