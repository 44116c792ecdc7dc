"""The five nouns: Site (where), Layer (what an equation sees), Delta (the equation), Method (the
recipe), Host (the adapted model).
"""
