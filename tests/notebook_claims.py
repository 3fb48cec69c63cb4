"""What the notebooks say of tiny-facts: words of their text, and what makes them true.

By notebook: each key stands word for word in its text, each value is an expression of what its
cells have defined at the end. ``test_notebooks.py`` looks for the one and evaluates the other.
"""

QUICKSTART = {
    "The answer it explains is the model's own top prediction": (
        "found.target.id == found.predictions()['id'][0] and found.target.text == ' Paris'"
    ),
    "the bars add up to the whole rise": (
        "abs(found.layers()['score'].sum() - found.log_prob + found.embedding_log_prob) < 1e-4"
    ),
    "One bar stands out: the attention of layer 3.": (
        "(two := found.layers().nlargest(2, 'score'))[['layer', 'kind']].values.tolist()[0]"
        " == [3, 'attn'] and two['score'].iloc[0] > 2 * two['score'].iloc[1]"
    ),
    'Nearly all that it brings comes from " France".': (
        "(p := found.positions(layer, head).set_index('token')['score'])[' France'] > 0.9 * p.sum()"
    ),
    "Many neurons raise the answer without naming it first.": (
        "sum(row[0] != ' Paris' for row in found.neurons('ffn', 10, tokens=4)['raises']) >= 5"
    ),
    "ten best of 3,072 FFN neurons, and of 4,608 attention neurons, ten of each had to be": (
        "[(c['evaluated'], c['total']) for c in few.certificates().values()]"
        " == [(10, 3072), (10, 4608)]"
    ),
    'Without its ten best neurons the model no longer says " Paris"': (
        "zeroed['target_rank'].tolist()[0] == 1 and zeroed['target_rank'].tolist()[1] > 1"
    ),
    "random neurons hardly make a difference": (
        "mask_curve(found, control, tops)['prob'].min() > 0.95 * zeroed['prob'][0]"
    ),
}

PAPER_EXAMPLE = {
    "Half of the rise is from the FFN of layer 0. Next is the attention of layer 3.": (
        "(s := found.layers().set_index(['kind', 'layer'])['score'].sort_values()).index[-2:]"
        ".tolist() == [('attn', 3), ('ffn', 0)] and 0.48 < s.iloc[-1] / s.sum() < 0.52"
    ),
    "Only at the last token is it asked for, and there it comes up layer by layer.": (
        "found.log_probs().query('position == position.max()')['log_prob'].is_monotonic_increasing"
    ),
    'most of it comes from the pieces of " Proust", and more than half from " Pro" alone': (
        "(p := found.positions(layer, head).groupby('token')['score'].sum())"
        "[[' Pro', 'u', 'st']].sum() > 0.8 * p.sum() and p[' Pro'] > p.sum() / 2"
    ),
    "The best of them speak of languages, and not of French alone": (
        "all(len({' French', ' German', ' Danish', ' Italian', ' Greek'} & set(row)) >= 1"
        " for row in found.neurons('ffn', 5, tokens=4)['raises'])"
    ),
    "Scores are small here": (
        "found.attn_neurons.score[0] < 0.1 and found.ffn_neurons.score[0] > 1"
    ),
    "what a head brings is spread over many of them": (
        "found.attn_neurons.score[0] < 0.1 * found.heads(top=1)['score'][0]"
    ),
    "The token embedding and the first layer fed nearly all of them.": (
        "fed.query('score > 0').sort_values('score', ascending=False).head(3)"
        "[['kind']].values.ravel().tolist() == ['embed', 'attn', 'ffn']"
        " and fed.nlargest(3, 'score')['score'].sum()"
        " > 0.95 * fed.query('score > 0')['score'].sum()"
    ),
    'They are in the first layer, at " Pro"': (
        "set(five['layer']) == {0} and"
        " {found.captured.prompt.token_texts[p] for p in five['position']} == {' Pro'}"
    ),
    'three of the five raise " French" among six tokens, and one raises it first': (
        "sum(' French' in row for row in carried) == 3"
        " and sum(row[0] == ' French' for row in carried) == 1"
    ),
    "What they say there is hardly an answer.": (
        "not any(' French' in row for row in five['raises'])"
    ),
    "Thirty value neurons carry the answer, and thirty query neurons most of it.": (
        "left['value'][2] < 0.05 * left['value'][0] and left['query'][2] < 0.5 * left['query'][0]"
    ),
    "Random neurons of the same layers take nothing away.": (
        "left['random'].min() > 0.99 * left['random'][0]"
    ),
    "at another token and three layers earlier": "layer - 0 == 3 and head == 2",
}

COMPARING_METHODS = {
    "24 of these prompts": "len(found.prompts) == 24",
    "The mean probability of the answer is .993 as it is.": (
        "round(mean['before'].iloc[0], 3) == 0.993"
    ),
    "Random and norm-matched neurons take next to nothing from it, whatever their number": (
        "mean.query(\"method in ['random', 'norm_matched']\")['after'].min() > 0.98"
    ),
    "so does `norm`, but for a little at 100": (
        "mean.query(\"method == 'norm' and top < 100\")['after'].min() > 0.99"
        " and 0.9 < mean.query(\"method == 'norm' and top == 100\")['after'].item() < 0.97"
    ),
    "The layers of the neurons that each method chose.": (
        "found.rankings.groupby('method')['rank'].max().min() >= 10"
    ),
    "With 100 neurons zeroed nearly every method has found what the answer needs": (
        "(mean.query('top == 100').set_index('method')['after'] < 0.1).sum() == 4"
    ),
    "Four prompts a type are few": (
        "found.prompts['knowledge_type'].value_counts().tolist() == [4] * 6"
    ),
    "The paper's method is better than norm, coefficient, both together, and the controls.": (
        "(areas := found.comparisons(to='log_prob_increase', metrics=['log_prob'], area=True)"
        ".set_index('method')).drop('gradient_activation')['low'].min() > 0"
        " and areas.drop('gradient_activation')['q'].max() < 0.01"
    ),
    "24 prompts decide nothing: the interval holds 0": (
        "(one := found.comparisons(to='log_prob_increase', metrics=['log_prob'], area=True)"
        ".set_index('method').loc['gradient_activation'])['low'] < 0 < one['high']"
    ),
    "The ten best neurons should take some four nats, and take less than one on average": (
        "(ten := found.calibration().query(\"method == 'log_prob_increase' and top == 10\"))"
        "['predicted'].between(-4.5, -3.5).all() and ten['measured'].between(-1, 0).all()"
    ),
}

COMPARATIVE_NEURON_ANALYSIS = {
    "One head stands out, in the first layer.": (
        "layer == 0 and worst['change'].iloc[0] < 5 * worst['change'].iloc[1]"
    ),
    "Little of what is lost is the head's own: most is what the FFNs of the first layers wrote.": (
        "(lost := without.layers().set_index(['kind', 'layer'])['difference'])"
        "[[('ffn', 0), ('ffn', 1)]].sum() > lost.sum() / 2"
        " and found.heads().set_index(['layer', 'head'])['score'][layer, head] < lost.sum() / 5"
    ),
    "speak of numbers near the sum": (
        "sum(bool({' twelve', ' thirteen', ' fourteen', ' eighteen'} & set(row))"
        " for row in without.neurons('ffn', 6, tokens=4)['raises']) == 6"
    ),
    "Without it their coefficients fall to less than half.": (
        "(six := without.neurons('ffn', 6)).eval('other_coefficient < 0.5 * coefficient').all()"
    ),
    "Three neurons of 3,072 take most of the answer with them: another one is now likelier.": (
        "left['prob'][1] < 0.2 * left['prob'][0] and left['target_rank'].tolist()[:2] == [1, 2]"
    ),
    "thirty of them, without any other FFN neuron, give most of it": (
        "mask_curve(found, without.ffn_neurons, (30,), keep=True)['prob'][0]"
        " > 0.8 * left['prob'][0]"
    ),
    "Zeroing more than ten gives back a little": "left['prob'][2] < left['prob'][3] < 0.1",
    'Into the number neurons flows what the head carries from " 6"': (
        "(fed := graph.node_table().query(f'kind == \"attn\" and head == {head}'))['token']"
        ".unique().tolist() == [' 6'] and fed['layer'].unique().tolist() == [layer]"
    ),
    "What differs most are neurons that are on in the *other* run": (
        "(three := changed.neurons('ffn', 3)).eval("
        "'other_coefficient > 2 * coefficient and abs(score) < 0.02 and other_score < -0.2').all()"
    ),
}

EXTENDING_TRANSFORMERLENS = {
    "Not as it stands: `logit_attrs` expects weights into which the gain": (
        "(last := beside.tail(len(found.layers())))['logit_attrs'].sub(last['with the gain'])"
        ".abs().max() > 1"
    ),
    "With the gain put in, the numbers are ours.": (
        "abs(beside.tail(len(found.layers()))['with the gain'].to_numpy()"
        " - found.layers()['score'].to_numpy()).max() < 1e-4"
    ),
    'log p(" Paris") falls and log p(" Rome") rises': (
        "words[' Paris'] < -1 and words[' Rome'] > 1 and seen['norm of FFN 5'] > 0"
    ),
    "the answer stays, less sure": (
        "halved.predictions()['token'][0] == ' Paris' and halved.log_prob < full.log_prob - 0.3"
    ),
    "Each prompt gets what it gets alone.": (
        "all(result.ffn_neurons.neurons()[:20] =="
        " attribute(model, text).ffn_neurons.neurons()[:20]"
        " for text, result in zip(prompts, results))"
    ),
    "Scores are computed in float32 all the same": (
        "half.out.dtype == torch.float32 and half.host.dtype == torch.bfloat16 and len(same) >= 28"
    ),
}

YOUR_OWN_METHOD = {
    "Two of the paper's three best are not here": (
        "len(set(found.ffn_neurons.neurons()[:3]) - set(best)) == 2"
    ),
    "they raise capitals in general": (
        "all(len({' Beijing', ' Lima', ' Havana', ' Caracas', ' Abuja', ' Ankara', ' Mogadishu'}"
        " & set(row)) >= 3 for row in found.neurons('ffn', 2, tokens=5)['raises'])"
    ),
    "It finds neurons that matter, which random ones do not": (
        "(after := mean.set_index(['method', 'top'])['after'])['above_rivals', 30] < 0.5"
        " and after['random', 30] > 0.98"
    ),
    "it is worse than the paper's method": (
        "(areas := tried.comparisons(to='log_prob_increase', metrics=['log_prob'], area=True)"
        ".set_index('method').loc['above_rivals'])['low'] > 0 and areas['q'] < 0.05"
    ),
}

KNOWLEDGE_TYPES = {
    "tiny-facts was trained on less than half of the facts in this set": (
        "(trained := [each.fact.trained for each in load_prompts('paper')]).count(True)"
        " < len(trained) / 2"
    ),
    "As many prompts of each type": "{name: types.count(name) for name in types} == {"
    "name: PER_TYPE for name in types} and len(set(types)) == 6",
    "capitals come mostly from attention; everything else mostly from the FFNs": (
        "(sums := layer_sums(layers).set_index('knowledge_type').drop('all').eval('attn > ffn'))"
        "[sums].index.tolist() == ['capital']"
    ),
    "For every type but one the best layer is the FFN of layer 0.": (
        "(first := layers_by_type(layers).query('rank == 1').set_index('knowledge_type'))"
        ".drop('capital').eval('kind == \"ffn\" and layer == 0').all()"
        " and first.loc['capital', ['kind', 'layer']].tolist() == ['attn', 3]"
    ),
    "which is the best attention layer of the others too, language aside": (
        "(attention := layers_by_type(layers).query('kind == \"attn\"').sort_values('rank')"
        ".drop_duplicates('knowledge_type').set_index('knowledge_type')['layer']).to_dict()"
        " == {**dict.fromkeys(types, 3), 'language': 0}"
    ),
    "About a dozen of thirty, whatever the answer is. Of numbers only a few": (
        "shared.drop('number').between(11, 13).all() and shared['number'] == 3"
    ),
    "Prompts of one type share far more than prompts of two types do.": (
        "(table := overlap_table(best, by='knowledge_type').assign("
        "own=lambda t: t['first'] == t['second'])).query('own')['jaccard'].min()"
        " > 1.5 * table.query('not own')['jaccard'].max()"
    ),
    "Each type loses, and only itself: from a quarter to a half of the probability": (
        "(own := {name: left[name][name] for name in left if name != 'number'})"
        " and all(0.4 < part < 0.78 for part in own.values())"
        " and all(left[a][b] > 0.98 for a in left for b in left if a != b)"
    ),
    "The exception is again number": "left['number']['number'] > 0.95",
}

CLAIMS = {
    "quickstart": QUICKSTART,
    "paper_example": PAPER_EXAMPLE,
    "knowledge_types": KNOWLEDGE_TYPES,
    "comparing_methods": COMPARING_METHODS,
    "comparative_neuron_analysis": COMPARATIVE_NEURON_ANALYSIS,
    "extending_transformerlens": EXTENDING_TRANSFORMERLENS,
    "your_own_method": YOUR_OWN_METHOD,
}
