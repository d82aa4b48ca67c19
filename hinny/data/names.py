"""Names of people in invented phone books: common, short, distinct; 100 × 100 of them."""

FIRST = """
Ada Alan Alice Amy Andy Anna Anton Arthur Ben Bella Bill Boris Bruno Carl Carol Clara Cora Dan Daisy David Della
Dora Doug Ed Elena Ella Emma Eric Eva Fay Felix Finn Flora Frank Fred Gail Gene George Gina Grace Greta Hans Harry
Helen Henry Hugo Ida Igor Ines Iris Ivan Jack James Jane Jill Joan John Julia Karl Kate Ken Kim Kurt Lara Lena Leo
Lily Lisa Luke Mark Mary Max Mia Mike Mona Nick Nina Nora Olga Oscar Otto Paul Peter Rachel Ralph Rita Rosa Ruth
Sam Sara Simon Sofia Tess Tim Tom Uma Vera Victor Wanda Will
"""

LAST = """
Adams Allen Baker Ball Banks Barnes Bell Berg Bishop Black Blake Boyd Brown Burns Bush Carter Clark Cole Cook Cooper
Cox Cross Davis Dean Diaz Dixon Drake Duncan Dunn Ellis Evans Fisher Flynn Ford Foster Fox Gibson Gray Green Hall Hart
Hayes Hill Holt Hood Hunt Jones Kelly Kent King Knight Lamb Lane Lee Lewis Long Lopez Lowe Marsh Martin Mason Miller
Moore Moss Myers Nash Nolan North Owens Page Park Parker Perry Pope Porter Price Quinn Reed Reyes Rice Rose Ross Ruiz
Shaw Silva Smith Snow Stone Swan Taylor Turner Wade Walker Ward Watson Webb West White Wood Young
"""
