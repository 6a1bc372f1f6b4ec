"""experimentation (I/O): runs what `experiments` only reckons: experiments, rollouts and bandits of a live gateway.

`evidence` takes what was seen to the store. `rollouts`, `bandits` and `verdicts` follow it there, and decide while they
have the lease. `reports` and `files` say what experiments found, and `rollout_commands` does what people ask of
rollouts. Import them one by one: the store and the statistics bring large libraries.
"""
