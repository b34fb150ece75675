# %% [markdown]
# # Reading a sweep
#
# A sweep from Python is an object: its trials are a table, its report is another, and the study is Optuna's. It runs
# without network.

# %%
import mergelab as ml

search = ml.sweep("task.limit=100", method="ties", task="rte", source="mini", n_trials=5)

# %% [markdown]
# ## The trials
#
# `select` scores are those of complete trials. A trial that was stopped early has an estimate with an interval.

# %%
table = search.table
print(table.to_string())

# %% [markdown]
# ## The winner
#
# `best_values` is the score that chose it, `scores` what it has on the examples that chose nothing. The second is the
# one to report: the first is the best of several, and partly luck.

# %%
print(search.best_params)
print("selecting:", search.best_values)
print("reporting:", search.scores)

# %% [markdown]
# ## Beside the baselines
#
# The report has base, experts, the soup and the paper's defaults, measured on the same examples.

# %%
print(search.report.to_string())

# %% [markdown]
# ## With Optuna's own tools

# %%
study = search.study
states = [trial.state.name for trial in study.trials]
print({state: states.count(state) for state in dict.fromkeys(states)})

# %%
search.plot()

# %% [markdown]
# A sweep goes on where it stopped: the same call with a larger `n_trials` adds trials to the same study and the same
# MLflow run.

# %%
longer = ml.sweep("task.limit=100", method="ties", task="rte", source="mini", n_trials=6)
assert len(longer.table) == 6
