//! Medians, quantiles, and how sure they are. No distribution is assumed anywhere.

/// A sample, in order.
#[derive(Clone, Debug)]
pub struct Sample(Vec<f64>);

impl Sample {
    /// Puts the values in order; those that are no numbers are a caller's bug.
    ///
    /// # Panics
    /// On a value that is no number.
    #[must_use]
    pub fn new(mut values: Vec<f64>) -> Self {
        assert!(
            values.iter().all(|v| v.is_finite()),
            "no number: {values:?}"
        );
        values.sort_by(f64::total_cmp);
        Self(values)
    }

    /// How many values there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// There are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The smallest value that at least `thousandths` of all do not exceed; none without values.
    #[must_use]
    pub fn quantile(&self, thousandths: usize) -> Option<f64> {
        let rank = (self.len() * thousandths).div_ceil(1000).max(1);
        self.0.get(rank - 1).copied()
    }

    /// The median; none without values.
    #[must_use]
    pub fn median(&self) -> Option<f64> {
        let middle = self.len() / 2;
        let upper = *self.0.get(middle)?;
        if self.len() % 2 == 1 {
            return Some(upper);
        }
        Some(f64::midpoint(self.0.get(middle - 1)?.to_owned(), upper))
    }

    /// The smallest and the greatest value.
    #[must_use]
    pub fn range(&self) -> Option<(f64, f64)> {
        Some((*self.0.first()?, *self.0.last()?))
    }

    /// An interval that holds the true median with a probability of at least 95 %, from the order of the
    /// values alone (the sign test's); none with fewer than six values.
    #[must_use]
    pub fn median_interval(&self) -> Option<(f64, f64)> {
        let n = self.len();
        // Below the true median lie binomially many: how many can be cut off at each end?
        let mut term = 0.5_f64.powi(i32::try_from(n).ok()?);
        let mut below = 0.0;
        let mut cut = 0;
        for k in 0..n {
            below += term;
            if below > 0.025 {
                break;
            }
            cut = k + 1;
            term *= (n - k) as f64 / (k + 1) as f64;
        }
        let low = cut.checked_sub(1)?;
        Some((*self.0.get(low)?, *self.0.get(n - cut)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn up_to(n: u32) -> Sample {
        Sample::new((1..=n).rev().map(f64::from).collect())
    }

    #[test]
    fn quantiles_are_values_of_the_sample() {
        let s = up_to(1000);
        assert_eq!(s.quantile(500), Some(500.0));
        assert_eq!(s.quantile(999), Some(999.0));
        assert_eq!(s.quantile(1000), Some(1000.0));
        assert_eq!(s.range(), Some((1.0, 1000.0)));
        assert_eq!(Sample::new(Vec::new()).quantile(500), None);
    }

    #[test]
    fn median_of_an_even_number_lies_between() {
        assert_eq!(up_to(4).median(), Some(2.5));
        assert_eq!(up_to(5).median(), Some(3.0));
        assert_eq!(Sample::new(Vec::new()).median(), None);
    }

    #[test]
    fn interval_of_the_median_has_the_ranks_of_the_tables() {
        assert_eq!(up_to(5).median_interval(), None);
        assert_eq!(up_to(6).median_interval(), Some((1.0, 6.0)));
        assert_eq!(up_to(15).median_interval(), Some((4.0, 12.0)));
        assert_eq!(up_to(20).median_interval(), Some((6.0, 15.0)));
    }
}
