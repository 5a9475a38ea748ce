"""A simulated month of the whole loop: a world whose truth is known, served, tried out on, watched, retrained and told of.

    plan     what happens when, and the constants of behaviour      truth    what people want, and what they do with a list
    place    the month's own deployment                             source   the world's own events, day by day
    serve    a day of requests                                      night    what happens between two days
    learn    training and release                                   story    what is remembered of each day
    run      the month, in order                                    report, plots, judge   what is told at the end

Everything that decides is the product's own code, called with a simulated instant. Here are only people and a calendar.
"""
