"""The page at /dashboard and what it shows: `pages` serves both, `feed` makes the figures, `losses` and `journal`
remember what nobody may have been looking at when it happened. `static/` is the page itself, as browsers get it."""
