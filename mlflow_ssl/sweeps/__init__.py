"""Parts of a sweep: what is searched, the trials so far, and the processes that train them."""
