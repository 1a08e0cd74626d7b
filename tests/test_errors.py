from peftkit.errors import Problem, UserError, did_you_mean, nearest


def test_problem_says_where_got_expected_and_fix():
    problem = Problem("recipe.yaml:7 method.rank", "-8", "a positive integer", "try rank: 16")
    assert str(problem) == "recipe.yaml:7 method.rank: got -8, expected a positive integer; try rank: 16"


def test_user_error_carries_all_problems_and_exit_code_two():
    error = UserError([Problem("a", "1", "2"), Problem("b", "3", "4")])
    assert error.exit_code == 2
    assert len(error.problems) == 2
    assert str(error).count("\n") == 1


def test_nearest_ignores_case_and_gives_up_on_strangers():
    assert nearest("Learning_Rat", ["learning_rate", "epochs"]) == ["learning_rate"]
    assert nearest("xyzzy", ["learning_rate"]) == []
    assert did_you_mean("xyzzy", ["b", "a"]) == "known: a, b"
